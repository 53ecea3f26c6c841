"""Defines the base class of loaded, trainable diffusers pipelines.

A family writes :meth:`DiffusersFlowModel.encode` and :meth:`DiffusersFlowModel.velocity`. It overrides
``scaled`` and ``unscaled`` (latents), ``posterior`` or ``sigmas`` if its pipeline differs there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.model import DtypeName, EncoderName, FlowModel, torch_dtype
from posttrain.models._resting import Resting
from posttrain.weights import pipeline_folder
from posttrain.weights.files import content_hash
from posttrain.weights.hugging_face import explained, quiet
from posttrain.weights.transformer import LORA, next_adapter, save_component

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition

PROMPT_BATCH = 8
"""Rows in every call of the text encoders; the empty prompt fills up a short batch. The number of rows
decides which kernels run, and other kernels change a prompt's last bits."""
IMAGE_BATCH, PIXEL_BATCH = 8, 512 * 512
"""Most images, and most pixels, in every call of the image encoder (at least one image); grey images fill up
a short batch. The reason is the same, and a whole training batch would need too much memory."""
PIXELS = 2**20
"""Pixels that the decoder works on at a time: 4 images of 512 px. In float32 it needs more memory for an
image than the transformer does, and a larger batch is no faster."""


class Block(Protocol):
    """The members of the recipe's block (a DiffusersModel) that a loaded pipeline uses."""

    @property
    def offload(self) -> bool: ...

    def divisor_of(self, transformer: Any, factor: int) -> int: ...

    def encoding_settings(self) -> dict[str, Any]: ...


class DiffusersFlowModel(FlowModel):
    """A loaded diffusers pipeline."""

    def __init__(self, spec: Block, pipeline: Any, source: Path, device: torch.device) -> None:
        """Wrap the ``pipeline`` that ``spec`` loaded from the folder ``source``. Raises ModelError if its
        components do not fit together."""
        super().__init__(pipeline.transformer, device)
        self.spec: Any = spec
        """The recipe's block, with the family's own fields."""
        self.pipeline, self.source = pipeline, source
        self.vae, self.scheduler = pipeline.vae, pipeline.scheduler
        self.check()
        self.shift = float(self.scheduler.config.shift)
        self.factor = pipeline.vae_scale_factor
        self.divisor = spec.divisor_of(self.transformer.config, self.factor)
        self.encoders: dict[EncoderName, Resting] = {
            "prompts": Resting(self.text_encoders(), device),
            "images": Resting([self.vae], device),
        }
        for module in (self.transformer, self.vae, *self.text_encoders()):
            module.eval().requires_grad_(False)
        self.transformer.to(device)
        for name, encoder in self.encoders.items():
            if spec.offload:
                self.rest(name)
            else:
                encoder.settle()

    @abstractmethod
    def encode(self, prompts: list[str]) -> Condition:
        """The condition of exactly PROMPT_BATCH ``prompts``, from one call of the pipeline. The text
        encoders are on the device."""

    def check(self) -> None:
        """Raise ModelError if the pipeline's components do not fit together."""

    def scaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's ``latents`` (n, c, h, w) as the transformer takes them."""
        config = self.vae.config
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`scaled`."""
        config = self.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)

    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        extra = {}
        if scheduler.config.get("use_dynamic_shifting"):
            extra["mu"] = _mu(scheduler.config, (height // self.divisor) * (width // self.divisor))
        scheduler.set_timesteps(steps, **extra)
        return scheduler.sigmas.tolist()

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        import torch

        texts, conditions = list(prompts), []
        with torch.no_grad(), quiet(), self.encoders["prompts"].working():
            for i in range(0, len(texts), PROMPT_BATCH):
                batch = texts[i : i + PROMPT_BATCH]
                encoded = self.encode(batch + [""] * (PROMPT_BATCH - len(batch)))
                conditions.append({name: tensor[: len(batch)] for name, tensor in encoded.items()})
        return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        height, width = pixels.shape[-2:]
        at_once = max(1, min(IMAGE_BATCH, PIXEL_BATCH // (height * width)))
        none = torch.empty(0, *self.latent_shape(height, width), device=self.device)
        mean, logvar = [none], [none]
        with torch.no_grad(), self.encoders["images"].working():
            for images in pixels.to(self.device, torch.float32).split(at_once) if len(pixels) else ():
                full = torch.cat([images, images.new_zeros(at_once - len(images), 3, height, width)])
                posterior = self.vae.encode(full).latent_dist
                mean.append(posterior.mean[: len(images)])
                logvar.append(posterior.logvar[: len(images)])
        return torch.cat(mean), torch.cat(logvar)

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        return self.scaled(super().latents(mean, logvar, noise))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.vae.config.latent_channels, height // self.factor, width // self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        import torch

        pixels = latents.shape[-1] * latents.shape[-2] * self.factor**2
        with torch.no_grad(), self.encoders["images"].working():
            batches = self.unscaled(latents.float()).split(max(1, PIXELS // pixels))
            images = torch.cat([self.vae.decode(batch).sample for batch in batches])
            return (images / 2 + 0.5).clamp(0, 1)

    def identity(self, encoder: EncoderName) -> dict[str, Any]:
        if encoder == "images":
            return {"weights": content_hash(self.source, ["vae"]), "dtype": str(self.vae.dtype)}
        names = [n for n in sorted(self._components()) if n.startswith(("text_encoder", "tokenizer"))]
        return {
            "weights": content_hash(self.source, names),
            "components": names,
            "dtypes": [str(module.dtype) for module in self.text_encoders()],
            **self.spec.encoding_settings(),
        }

    def rest(self, encoder: EncoderName) -> None:
        if self.device.type != "cpu":
            self.encoders[encoder].rest()

    def encoder_modules(self, encoder: EncoderName) -> Sequence[Any]:
        return self.encoders[encoder].modules

    def text_encoders(self) -> list[Any]:
        """The pipeline's text encoders, in the order of their names."""
        return [getattr(self.pipeline, n) for n in sorted(self._components()) if n.startswith("text_encoder")]

    def save(self, folder: Path, dtype: DtypeName, weights: Mapping[str, Tensor]) -> None:
        used = self._components()
        pipeline_folder.link_components(self.source, folder, used - {"transformer"})
        pipeline_folder.write_index(self.source, folder, used)
        save_component(self.transformer, folder / "transformer", torch_dtype(dtype), weights)

    def load_weights(self, source: Path, merge: bool = True) -> None:
        if not (source / LORA).is_file():
            return super().load_weights(source, merge)
        with quiet(), explained(str(source / LORA)):
            name = next_adapter(self.transformer)
            # diffusers' loader also reads the formats of other tools
            self.pipeline.load_lora_weights(str(source), adapter_name=name)
            if merge:
                self.transformer.fuse_lora(adapter_names=[name])
                self.transformer.unload_lora()
        return None

    def _components(self) -> set[str]:
        return {name for name, component in self.pipeline.components.items() if component is not None}


def _mu(config: Any, tokens: int) -> float:
    """The logarithm of the dynamic shift for images of so many ``tokens``: linear between the configured
    sizes, as ``calculate_shift`` in diffusers' pipelines."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - base) / (high - low)
    return tokens * slope + (base - slope * low)
