"""Defines the base class of loaded, trainable diffusers pipelines.

A family writes :meth:`DiffusersFlowModel.encode` and :meth:`DiffusersFlowModel.velocity`. It overrides
``scaled`` and ``unscaled`` (latents), ``encoded``, ``decoded`` and ``latent_channels`` (autoencoder),
``gives_times``, ``mu``, ``grid_mu`` or ``sigma`` if its pipeline differs there.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.errors import ModelError
from posttrain.flow.guidance import ClassifierFree
from posttrain.flow.rectified import shift_sigma
from posttrain.model import DtypeName, EncoderName, FlowModel, torch_dtype
from posttrain.models._fitting import check_scale, check_scheduler
from posttrain.models._resting import Resting
from posttrain.weights import pipeline_folder
from posttrain.weights.adapter import load_adapter
from posttrain.weights.companions import write_components
from posttrain.weights.files import content_hash
from posttrain.weights.hugging_face import quiet
from posttrain.weights.tokenizer import encoder_of
from posttrain.weights.transformer import LORA, save_component

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.weights.writing import Entry

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

    def longest_side(self, transformer: Any, factor: int) -> int | None: ...

    def guidance_rule_of(self, transformer: Any) -> ClassifierFree: ...

    def encoding_settings(self) -> dict[str, Any]: ...


class DiffusersFlowModel(FlowModel):
    """A loaded diffusers pipeline."""

    gives_times: bool = False
    """Whether the pipeline gives its scheduler the times to sample at, before the shift: 1 to 1 / steps. If
    not, they are the scheduler's own."""

    shifts: tuple[str, ...] = ("shift",)
    """Settings of the scheduler of which it must have one: each says how its sigmas are shifted."""

    def __init__(self, spec: Block, pipeline: Any, source: Path, device: torch.device) -> None:
        """Wrap the ``pipeline`` that ``spec`` loaded from the folder ``source``. Raises ModelError if its
        components do not fit together."""
        super().__init__(pipeline.transformer, device)
        self.spec: Any = spec
        """The recipe's block, with the family's own fields."""
        self.pipeline, self.source = pipeline, source
        self.vae, self.scheduler = pipeline.vae, pipeline.scheduler
        self.check()
        check_scheduler(self.scheduler, self.shifts)
        if type(self).scaled is DiffusersFlowModel.scaled:
            check_scale(self.vae.config)
        self.guidance_rule = spec.guidance_rule_of(self.transformer.config)
        self.factor = pipeline.vae_scale_factor
        self.divisor = spec.divisor_of(self.transformer.config, self.factor)
        self.encoders: dict[EncoderName, Resting] = {
            "prompts": Resting(self.text_encoders(), device, by_block=True),
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

    def encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's mean and log-variance (n, c, h, w) of ``pixels`` (n, 3, H, W), in one call."""
        posterior = self.vae.encode(pixels).latent_dist
        return posterior.mean, posterior.logvar

    def decoded(self, latents: Tensor) -> Tensor:
        """The pixels (n, 3, H, W) in [-1, 1] of the autoencoder's ``latents``, in one call."""
        return self.vae.decode(latents).sample

    def latent_channels(self) -> int:
        """The number of channels of latents."""
        return self.vae.config.latent_channels

    def sigma(self, t: Tensor, size: Sequence[int]) -> Tensor:
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return shift_sigma(t, config.shift)
        mu = self.mu(self.tokens(size))
        linear = config.get("time_shift_type") == "linear"
        return shift_sigma(t, mu if linear else math.exp(mu))

    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        dynamic = scheduler.config.get("use_dynamic_shifting")
        mu = self.grid_mu(self.tokens(self.latent_shape(height, width)[1:]), steps) if dynamic else None
        times = [1 - i / steps for i in range(steps)] if self.gives_times else None
        scheduler.set_timesteps(steps, sigmas=times, **({} if mu is None else {"mu": mu}))
        return scheduler.sigmas.tolist()

    def tokens(self, size: Sequence[int]) -> int:
        """The number of tokens of latents of ``size`` (h, w)."""
        side = self.divisor // self.factor
        return (size[0] // side) * (size[1] // side)

    def mu(self, tokens: int) -> float:
        """The size of the dynamic shift for images of so many ``tokens``; its logarithm if
        ``time_shift_type`` is exponential. Linear between the configured sizes, as ``calculate_shift`` in
        diffusers' pipelines."""
        config = self.scheduler.config
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (most - base) / (high - low)
        return tokens * slope + (base - slope * low)

    def grid_mu(self, tokens: int, steps: int) -> float:
        """The same for a sampling grid of so many ``steps``, where a pipeline's shift depends on them."""
        del steps
        return self.mu(tokens)

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
                for found, moment in zip((mean, logvar), self.encoded(full), strict=True):
                    found.append(moment[: len(images)])
        return torch.cat(mean), torch.cat(logvar)

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        return self.scaled(super().latents(mean, logvar, noise))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        most = self.spec.longest_side(self.transformer.config, self.factor)
        # without this check the transformer fails in its forward, in units of its own
        if most is not None and max(height, width) > most:
            raise ModelError(f"{width} x {height} px is too large: this model's sides have at most {most} px")
        return (self.latent_channels(), height // self.factor, width // self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        import torch

        pixels = latents.shape[-1] * latents.shape[-2] * self.factor**2
        with torch.no_grad(), self.encoders["images"].working():
            batches = self.unscaled(latents.float()).split(max(1, PIXELS // pixels))
            images = torch.cat([self.decoded(batch) for batch in batches])
            images = images / 2 + 0.5
            return images.clamp(0, 1) + 0 * images  # infinity stays no number, and does not become white

    def identity(self, encoder: EncoderName) -> dict[str, Any]:
        if encoder == "images":
            return {"weights": content_hash(self.source, ["vae"]), "dtype": str(self.vae.dtype)}
        names = [n for n in sorted(self._components()) if n.startswith("text_encoder") or encoder_of(n)]
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

    def bytes_at_work(self, encoder: EncoderName) -> int:
        return self.encoders[encoder].bytes_at_work()

    def text_encoders(self) -> list[Any]:
        """The pipeline's text encoders, in the order of their names."""
        return [getattr(self.pipeline, n) for n in sorted(self._components()) if n.startswith("text_encoder")]

    def save(self, folder: Path, dtype: DtypeName, weights: Mapping[str, Entry]) -> None:
        used = self._components()
        write_components(self.source, folder, used - {"transformer"}, torch_dtype(dtype))
        pipeline_folder.write_index(self.source, folder, used)
        save_component(self.transformer, folder / "transformer", torch_dtype(dtype), weights)

    def save_exact(self, folder: Path, weights: Mapping[str, Entry]) -> None:
        save_component(self.transformer, folder / "transformer", torch_dtype("fp32"), weights)

    def load_weights(self, source: Path, merge: bool = True) -> None:
        if not (source / LORA).is_file():
            return super().load_weights(source, merge)
        return load_adapter(self.transformer, source / LORA, merge=merge, pipeline=self.pipeline)

    def _components(self) -> set[str]:
        return {name for name, component in self.pipeline.components.items() if component is not None}
