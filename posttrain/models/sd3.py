"""Stable Diffusion 3 and 3.5, in the folder format that diffusers reads and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.model import DtypeName, EncoderName, FlowModel, Model, torch_dtype
from posttrain.models import _weights
from posttrain.models._resting import Resting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition

PROMPTS_AT_ONCE = 8
"""Every call of the text encoders has this many rows, short ones filled up with the empty prompt: kernels are
chosen by the number of rows, and would give a prompt other last bits in a batch of another size."""
IMAGES_AT_ONCE, PIXELS_AT_ONCE = 8, 512 * 512
"""Every call of the image encoder has as many images as these allow, at least one, and short ones are filled
up with grey: for the same reason, and because a whole training batch would need much memory here."""
TEXT_COMPONENTS = tuple(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
PIXELS = 2**20
"""The decoder works on this many at a time, 4 images of 512 px: in float32 it needs more memory for an
image than the transformer, and is no faster on more of them."""


class SD3(Model):
    """A Stable Diffusion 3 / 3.5 pipeline."""

    type: Literal["sd3"] = "sd3"
    pipelines: ClassVar = _weights.SD3_PIPELINES

    path: str = Field(min_length=1)
    """A diffusers folder, a hub name such as ``stabilityai/stable-diffusion-3.5-medium``, or
    ``posttrain/tiny-sd3``, the small model of the Shapes world that comes with the package."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    dtype: DtypeName = "fp32"
    """Of the text encoders, and of the transformer where it is frozen (LoRA). The VAE is always fp32."""
    max_sequence_length: int = Field(256, ge=1, le=512)
    """Tokens of the T5 prompt, in training and in evaluation alike. The published training runs used 77
    (SOAR) or 128 (Flow-GRPO, DiffusionNFT) and evaluated at 256."""
    text_encoder_3: bool = True
    """False leaves the T5 encoder out, as diffusers allows; its tokens are then zeros."""
    offload: bool = False
    """Keep the text encoders and the VAE in the CPU's memory, and on the device only while they work. What
    nobody needs any more, since its work is cached, leaves the device in any case."""

    def load(self, device: torch.device, transformer_dtype: DtypeName) -> SD3FlowModel:
        from diffusers import StableDiffusion3Pipeline

        source = _weights.locate(self.path)
        dtypes = {
            "default": torch_dtype(self.dtype),
            "vae": torch_dtype("fp32"),
            "transformer": torch_dtype(transformer_dtype),
        }
        with _weights.quiet(), _weights.explained(self.path):
            if not Path(source).is_dir():
                source = StableDiffusion3Pipeline.download(source, revision=self.revision)
            # diffusers wants to be told of the one component that may be missing
            with_t5 = self.text_encoder_3 and "text_encoder_3" in _weights.components(Path(source))
            left_out: dict[str, Any] = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
            pipeline = StableDiffusion3Pipeline.from_pretrained(source, torch_dtype=dtypes, **left_out)
        return SD3FlowModel(pipeline, Path(source), self.max_sequence_length, device, offload=self.offload)

    def outline(self, transformer_dtype: DtypeName, device: torch.device) -> SD3FlowModel | None:
        from posttrain.models._unpublished import Unpublished, configs_at

        if (configs := configs_at(self.path)) is None:
            return None
        if not self.text_encoder_3:
            configs = {name: config for name, config in configs.items() if name != "text_encoder_3"}
        dtypes = {"default": torch_dtype(self.dtype), "transformer": torch_dtype(transformer_dtype)}
        with _weights.quiet():
            pipeline = Unpublished(configs, dtypes, device)
        return SD3FlowModel(pipeline, Path(self.path), self.max_sequence_length, device)

    def frozen_dtype(self) -> DtypeName:
        return self.dtype

    def rests(self, encoder: EncoderName, *, cached: bool) -> bool:
        return self.offload or cached

    def offloaded(self) -> Model | None:
        return None if self.offload else self.model_copy(update={"offload": True})

    def missing(self) -> str | None:
        return _weights.missing(self.path, "transformer", self.pipelines)

    def divisor(self) -> int | None:
        from posttrain.models._unpublished import configs_at

        if (configs := configs_at(self.path)) is None:
            return None
        return 2 ** (len(configs["vae"]["block_out_channels"]) - 1) * configs["transformer"]["patch_size"]

    def encoding_bytes(self, encoder: EncoderName, side: int) -> int | None:
        from posttrain.models._unpublished import configs_at

        if (configs := configs_at(self.path)) is None or "text_encoder" not in configs:
            return None
        vae, transformer, clip = (configs[part] for part in ("vae", "transformer", "text_encoder"))
        if encoder == "images":
            latents = (side // 2 ** (len(vae["block_out_channels"]) - 1)) ** 2
            return 2 * 4 * vae["latent_channels"] * latents
        tokens = clip["max_position_embeddings"] + self.max_sequence_length
        values = tokens * transformer["joint_attention_dim"] + transformer["pooled_projection_dim"]
        return values * torch_dtype(self.dtype).itemsize

    def transformer_shapes(self) -> dict[str, tuple[int, ...]] | None:
        if (shapes := _weights.header_shapes(self.path, "transformer")) is not None:
            return shapes
        import torch

        if (
            _weights.local_folder(self.path)
            or (outline := self.outline("fp32", torch.device("meta"))) is None
        ):
            return None
        return {name: tuple(tensor.shape) for name, tensor in outline.transformer.state_dict().items()}


class SD3FlowModel(FlowModel):
    """A loaded Stable Diffusion 3 pipeline."""

    def __init__(
        self,
        pipeline: Any,
        source: Path,
        max_sequence_length: int,
        device: torch.device,
        *,
        offload: bool = False,
    ) -> None:
        self.pipeline, self.source, self.device = pipeline, source, device
        self.max_sequence_length = max_sequence_length
        self.transformer: Any = pipeline.transformer
        self.module: Any = self.transformer
        self.vae, self.scheduler = pipeline.vae, pipeline.scheduler
        _check_text_encoders(pipeline)
        self.shift = float(self.scheduler.config.shift)
        self.factor = pipeline.vae_scale_factor
        self.divisor = self.factor * self.transformer.config.patch_size
        self.encoders: dict[EncoderName, Resting] = {
            "prompts": Resting(self._text_encoders(), device),
            "images": Resting([self.vae], device),
        }
        for module in (self.transformer, self.vae, *self._text_encoders()):
            module.eval().requires_grad_(False)
        self.transformer.to(device)
        for name, encoder in self.encoders.items():
            if offload:
                self.rest(name)
            else:
                encoder.settle()

    def rest(self, encoder: EncoderName) -> None:
        if self.device.type != "cpu":
            self.encoders[encoder].rest()

    def encoder_modules(self, encoder: EncoderName) -> Sequence[Any]:
        return self.encoders[encoder].modules

    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        extra = {}
        if scheduler.config.get("use_dynamic_shifting"):
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

            tokens = (height // self.divisor) * (width // self.divisor)
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            extra["mu"] = calculate_shift(tokens, *(scheduler.config.get(n) for n in names))
        scheduler.set_timesteps(steps, **extra)
        return scheduler.sigmas.tolist()

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        import torch

        texts, parts = list(prompts), []
        with torch.no_grad(), _weights.quiet(), self.encoders["prompts"].working():
            for i in range(0, len(texts), PROMPTS_AT_ONCE):
                part = texts[i : i + PROMPTS_AT_ONCE]
                full = part + [""] * (PROMPTS_AT_ONCE - len(part))
                embeds, _, pooled, _ = self.pipeline.encode_prompt(
                    prompt=full,
                    prompt_2=full,
                    prompt_3=full,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.max_sequence_length,
                )
                parts.append((embeds[: len(part)], pooled[: len(part)]))
        embeds, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        height, width = pixels.shape[-2:]
        at_once = max(1, min(IMAGES_AT_ONCE, PIXELS_AT_ONCE // (height * width)))
        none = torch.empty(0, *self.latent_shape(height, width), device=self.device)
        mean, logvar = [none], [none]
        with torch.no_grad(), self.encoders["images"].working():
            for part in pixels.to(self.device, torch.float32).split(at_once) if len(pixels) else ():
                full = torch.cat([part, part.new_zeros(at_once - len(part), 3, height, width)])
                posterior = self.vae.encode(full).latent_dist
                mean.append(posterior.mean[: len(part)])
                logvar.append(posterior.logvar[: len(part)])
        return torch.cat(mean), torch.cat(logvar)

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        import torch

        drawn = mean + torch.exp(0.5 * logvar) * noise
        return (drawn - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def identity(self, encoder: EncoderName) -> dict[str, Any]:
        if encoder == "images":
            return {"weights": _weights.content_hash(self.source, ["vae"]), "dtype": str(self.vae.dtype)}
        names = [name for name in TEXT_COMPONENTS if getattr(self.pipeline, name) is not None]
        return {
            "weights": _weights.content_hash(self.source, names),
            "components": names,
            "dtypes": [str(module.dtype) for module in self._text_encoders()],
            "max_sequence_length": self.max_sequence_length,
        }

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (self.transformer.config.in_channels, height // self.factor, width // self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        import torch

        with torch.no_grad(), self.encoders["images"].working():
            scaled = latents.float() / self.vae.config.scaling_factor + self.vae.config.shift_factor
            parts = [self.vae.decode(some).sample for some in scaled.split(_at_a_time(latents, self.factor))]
            return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.transformer.dtype
        return self.module(
            hidden_states=latents.to(dtype),
            timestep=1000 * sigma,
            return_dict=False,
            **{name: tensor.to(dtype) for name, tensor in condition.items()},
        )[0].float()

    def save(self, folder: Path, dtype: DtypeName, weights: Mapping[str, Tensor]) -> None:
        used = {name for name, part in self.pipeline.components.items() if part is not None}
        _weights.link_components(self.source, folder, used - {"transformer"})
        _weights.write_index(self.source, folder, used)
        _weights.save_component(self.transformer, folder / "transformer", torch_dtype(dtype), weights)

    def save_lora(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        from peft import get_peft_model_state_dict

        from posttrain.tuning import ADAPTER

        state = get_peft_model_state_dict(self.transformer, dict(weights), adapter_name=ADAPTER)
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers={k: v.detach().cpu().contiguous() for k, v in state.items()},
            transformer_lora_adapter_metadata=self.transformer.peft_config[ADAPTER].to_dict(),
        )

    def load_weights(self, source: Path, merge: bool = True) -> None:
        lora = source / "pytorch_lora_weights.safetensors"
        if not lora.is_file():
            if getattr(self.transformer, "peft_config", None):
                self.pipeline.unload_lora_weights()  # the new weights have what they were started from
            _weights.load_component(self.transformer, source)
            return
        with _weights.quiet(), _weights.explained(str(lora)):
            name = f"before_{len(getattr(self.transformer, 'peft_config', {}))}"
            self.pipeline.load_lora_weights(str(source), adapter_name=name)
            if merge:
                self.pipeline.fuse_lora(components=["transformer"], adapter_names=[name])
                self.pipeline.unload_lora_weights()

    def _text_encoders(self) -> list[Any]:
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [encoder for name in names if (encoder := getattr(self.pipeline, name)) is not None]


def _at_a_time(images: Tensor, factor: int = 1) -> int:
    """How many of ``images``, of sides ``factor`` times what they are here, the autoencoder takes at once."""
    return max(1, PIXELS // (images.shape[-1] * images.shape[-2] * factor**2))


def _check_text_encoders(pipeline: Any) -> None:
    """Raise ModelError where the text encoders' widths do not fit the transformer."""
    if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
        raise ModelError("the pipeline has no CLIP text encoders; only text_encoder_3 may be missing")
    config = pipeline.transformer.config
    clip = [pipeline.text_encoder.config, pipeline.text_encoder_2.config]
    pooled = sum(c.projection_dim for c in clip)
    if pooled != config.pooled_projection_dim:
        raise ModelError(
            f"text encoders do not fit: their pooled widths {[c.projection_dim for c in clip]} add up to "
            f"{pooled}, the transformer takes {config.pooled_projection_dim}"
        )
    width = sum(c.hidden_size for c in clip)
    if width > config.joint_attention_dim:
        raise ModelError(
            f"text encoders do not fit: the CLIP widths {[c.hidden_size for c in clip]} add up to {width}, "
            f"over the transformer's {config.joint_attention_dim}"
        )
    if (t5 := pipeline.text_encoder_3) is not None and t5.config.d_model != config.joint_attention_dim:
        raise ModelError(
            f"text_encoder_3 does not fit: its width is {t5.config.d_model}, "
            f"the transformer takes {config.joint_attention_dim}"
        )
