"""Defines Qwen-Image in diffusers' folder format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.guidance import ClassifierFree
from posttrain.models._diffusers import DiffusersModel, compression
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._outline import configs_at
from posttrain.models._packing import packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from posttrain.condition import Condition

KNOWN = {
    "patch_size": 2,
    "guidance_embeds": False,
    "zero_cond_t": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}
"""The transformer's settings that would need other inputs if they were different (those of the editing and
layered variants)."""
LATENTS = 128
"""The side in latents of the images that the pipeline draws by default."""


class NormKept(ClassifierFree):
    """Classifier-free guidance whose velocity is scaled, in every token of 2 x 2 latents, to the norm of the
    velocity with the prompt (the ``true_cfg_scale`` of diffusers' QwenImagePipeline)."""

    def combined(self, v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        tokens = packed(super().combined(v_cond, v_uncond, scale))
        norm = packed(v_cond).norm(dim=-1, keepdim=True)
        # where guidance cancels a velocity, there is no direction to scale
        scaled = tokens * (norm / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        return unpacked(scaled, *v_cond.shape[-2:])


class QwenImageFlowModel(DiffusersFlowModel):
    """A loaded Qwen-Image pipeline. Its autoencoder is one of videos; an image is a video of one frame."""

    spec: QwenImage

    def encode(self, prompts: list[str]) -> Condition:
        pipeline, longest = self.pipeline, self.spec.max_sequence_length
        start = pipeline.prompt_template_encode_start_idx
        tokens = pipeline.tokenizer(
            # the model's authors guide with " " where there is no negative prompt
            [pipeline.prompt_template_encode.format(prompt or " ") for prompt in prompts],
            max_length=start + longest,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        # The attention is causal, so what follows a token, such as padding, does not change it.
        encoder = pipeline.text_encoder.model.language_model
        states = encoder(input_ids=tokens.input_ids.to(self.device), use_cache=False).last_hidden_state
        mask = tokens.attention_mask[:, start:].to(self.device).bool()
        return {
            "encoder_hidden_states": states[:, start:].masked_fill(~mask[..., None], 0),
            "encoder_hidden_states_mask": mask,
        }

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.forward_dtype or self.transformer.dtype
        height, width = latents.shape[-2:]
        tokens = self.module(
            hidden_states=packed(latents).to(dtype),
            timestep=sigma,
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
            encoder_hidden_states_mask=condition["encoder_hidden_states_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return unpacked(tokens.float(), height, width)

    def uniform_grid(self, steps: int) -> list[float]:
        # 1 to 1 / steps, as the pipeline gives them
        return [1 - i / steps for i in range(steps)]

    def encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels[:, :, None]).latent_dist
        return posterior.mean[:, :, 0], posterior.logvar[:, :, 0]

    def decoded(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents[:, :, None]).sample[:, :, 0]

    def scaled(self, latents: Tensor) -> Tensor:
        mean, std = self._moments(latents)
        return (latents - mean) / std

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, std = self._moments(latents)
        return latents * std + mean

    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    def check(self) -> None:
        transformer, vae = self.transformer.config, self.vae.config
        check_settings("transformer", transformer, KNOWN, "Qwen-Image")
        check_settings("vae", vae, {"input_channels": 3}, "RGB")
        check_moments(vae)
        taken = {"in_channels": transformer.in_channels, "out_channels": 4 * transformer.out_channels}
        for name, width in taken.items():
            if width != 4 * vae.z_dim:
                raise ModelError(
                    f"vae does not fit: 2 x 2 of its latents make {4 * vae.z_dim} channels, "
                    f"the transformer's {name} is made for {width}"
                )
        width = self.pipeline.text_encoder.config.text_config.hidden_size
        if width != transformer.joint_attention_dim:
            raise ModelError(
                f"text_encoder does not fit: its width is {width}, the transformer's joint_attention_dim is "
                f"{transformer.joint_attention_dim}"
            )

    def _moments(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation (c, 1, 1) of the autoencoder's latents."""
        config = self.vae.config
        mean, std = (latents.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
        return mean, std


def check_settings(component: str, config: Any, known: Mapping[str, Any], what: str) -> None:
    """Raise ModelError if a setting of a component's ``config`` is not as ``known`` for ``what``."""
    for name, value in known.items():
        if config[name] != value:
            raise ModelError(f"{component}/config.json: {name} is {config[name]}; for {what} it is {value}")


def check_moments(vae: Any) -> None:
    """Raise ModelError if the autoencoder's configuration does not give each channel a mean and deviation."""
    for name in ("latents_mean", "latents_std"):
        if len(vae[name]) != vae.z_dim:
            raise ModelError(
                f"vae/config.json: {name} has {len(vae[name])} numbers for {vae.z_dim} channels (z_dim)"
            )


class QwenImage(DiffusersModel):
    """A Qwen-Image pipeline (Wu et al. 2025, arXiv:2508.02324)."""

    type: Literal["qwen_image"] = "qwen_image"
    pipelines: ClassVar = ("QwenImagePipeline",)
    flow: ClassVar = QwenImageFlowModel

    max_sequence_length: int = Field(default=512, ge=1, le=1024)
    """Tokens of a prompt, with 5 that end it, in training and evaluation. Shorter prompts are padded to as
    many, which costs time and changes nothing; longer ones are cut."""

    def guidance_rule_of(self, transformer: Any) -> ClassifierFree:
        return NormKept()

    def native_side(self) -> int | None:
        configs = configs_at(self.path)
        return None if configs is None else LATENTS * compression(configs["vae"])
