"""Defines Qwen-Image in diffusers' folder format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.guidance import ClassifierFree
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._fitting import check_rope, check_settings, check_widths
from posttrain.models._packing import packed, unpacked

if TYPE_CHECKING:
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
    gives_times = True

    def encode(self, prompts: list[str]) -> Condition:
        tokenizer, template, start = self.tokenization()
        tokens = tokenizer(
            # the model's authors guide with " " where there is no negative prompt
            [template.format(prompt or " ") for prompt in prompts],
            max_length=start + self.spec.max_sequence_length,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        # The attention is causal, so what follows a token, such as padding, does not change it.
        states = self.states(tokens.input_ids.to(self.device))
        mask = tokens.attention_mask[:, start:].to(self.device).bool()
        return {
            "encoder_hidden_states": states[:, start:].masked_fill(~mask[..., None], 0),
            "encoder_hidden_states_mask": mask,
        }

    def tokenization(self) -> tuple[Any, str, int]:
        """The tokenizer, what prompts are written into, and how many of its first tokens are dropped."""
        pipeline = self.pipeline
        return pipeline.tokenizer, pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx

    def states(self, ids: Tensor) -> Tensor:
        """The text encoder's states (n, tokens, width) of the tokens ``ids`` (n, tokens)."""
        encoder = self.pipeline.text_encoder.model.language_model
        return encoder(input_ids=ids, use_cache=False).last_hidden_state

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
        check_settings("transformer", transformer, KNOWN, "for Qwen-Image it is")
        check_settings("vae", vae, {"input_channels": 3}, "for RGB it is")
        check_moments(vae)
        check_rope(transformer, "axes_dims_rope")
        taken = {"in_channels": transformer.in_channels, "out_channels": 4 * transformer.out_channels}
        for name, width in taken.items():
            if width != 4 * vae.z_dim:
                raise ModelError(
                    f"vae does not fit: 2 x 2 of its latents make {4 * vae.z_dim} channels, "
                    f"the transformer's {name} is made for {width}"
                )
        width = self.pipeline.text_encoder.config.text_config.hidden_size
        check_widths(transformer, ("text_encoder", "its width is", width, "joint_attention_dim"))

    def _moments(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation (c, 1, 1) of the autoencoder's latents."""
        config = self.vae.config
        mean, std = (latents.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
        return mean, std


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
    unread: ClassVar = frozenset({"pooled_projection_dim"})
    latents: ClassVar = 128

    max_sequence_length: int = Field(default=512, ge=1, le=1024)
    """Tokens of a prompt, with 5 that end it, in training and evaluation. Shorter prompts are padded to as
    many, which costs time and changes nothing; longer ones are cut."""

    def guidance_rule_of(self, transformer: Any) -> ClassifierFree:
        return NormKept()
