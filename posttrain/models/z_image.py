"""Defines Z-Image: one stream of image and text tokens, and prompts read by a chat model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.guidance import ClassifierFree
from posttrain.models._chat import QWEN, chats
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._fitting import check_settings, check_widths
from posttrain.models._outline import configs_at
from posttrain.models._z_image_layout import Z_IMAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.weights.single_file import SingleFile

KNOWN = {"all_patch_size": [2], "all_f_patch_size": [1], "siglip_feat_dim": None}
"""The transformer's settings that would need other inputs if they were different (the Omni variant has a
``siglip_feat_dim``)."""
MULTIPLE = 32
"""The transformer fills up a prompt to a multiple of so many tokens (``SEQ_MULTI_OF`` in diffusers)."""
CAUSAL = {"full_attention": None}
"""The mask of each kind of attention in Qwen3: none beside causality."""


class Added(ClassifierFree):
    """v_c + scale (v_c - v_u), as in diffusers' ZImagePipeline: 0 is no guidance, and a scale is 1 less than
    the usual one of the same effect."""

    none = 0.0
    usual = 4.0  # the base's, in its model card; Turbo, which differs in the scheduler's shift alone, takes 0

    def __init__(self, most: float) -> None:
        """``most``: the norm that a guided velocity may have, as a multiple of the norm of the velocity with
        the prompt; 0 for any norm."""
        self.most = most

    def combined(self, v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        velocity = v_cond + scale * (v_cond - v_uncond)
        if self.most == 0:
            return velocity
        norm, allowed = (v.flatten(1).norm(dim=1)[:, None, None, None] for v in (velocity, v_cond))
        # where guidance cancels a velocity, there is nothing to shorten
        return velocity * (self.most * allowed / norm.clamp_min(1e-12)).clamp_max(1)


class ZImageFlowModel(DiffusersFlowModel):
    """A loaded Z-Image pipeline."""

    spec: ZImage
    gives_times = True

    def encode(self, prompts: list[str]) -> Condition:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder.base_model
        tokens = tokenizer(
            chats(tokenizer, prompts, thinking=True),
            max_length=self.spec.max_sequence_length,
            padding="max_length",
            padding_side="right",
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = (tensor.to(self.device) for tensor in (tokens.input_ids, tokens.attention_mask.bool()))
        # The attention is causal, so what follows a token, such as padding, does not change it.
        states = encoder(
            input_ids=ids, attention_mask=CAUSAL, use_cache=False, output_hidden_states=True
        ).hidden_states[-2]
        return {
            "encoder_hidden_states": states.masked_fill(~mask[..., None], 0),
            "encoder_hidden_states_mask": mask,
        }

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        import torch

        dtype = self.forward_dtype or self.transformer.dtype
        embeds = condition["encoder_hidden_states"].to(dtype)
        mask = condition["encoder_hidden_states_mask"]
        # on torch's meta device no mask can be read, and a prompt counts as the longest one
        lengths = [embeds.shape[1]] * len(embeds) if mask.is_meta else mask.sum(1).tolist()
        velocities = self.module(
            list(latents.to(dtype)[:, :, None]),
            1 - sigma,
            [prompt[:length] for prompt, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(velocities))[:, :, 0].float()

    def check(self) -> None:
        config, longest = self.transformer.config, self.spec.max_sequence_length
        check_settings("transformer", config, KNOWN, "for Z-Image it is")
        check_widths(
            config,
            ("text_encoder", "its width is", self.pipeline.text_encoder.config.hidden_size, "cap_feat_dim"),
            ("vae", "its latent channels are", self.vae.config.latent_channels, "in_channels"),
        )
        if (reason := _too_long(longest, config)) is not None:
            raise ModelError(f"model.max_sequence_length is {longest}; {reason}")


def _too_long(longest: int, transformer: Any) -> str | None:
    """Why a ``transformer`` of this configuration has no positions for a prompt of ``longest`` tokens; None
    if it has them or its configuration does not say."""
    positions = transformer.get("axes_lens")
    # positions 1 to the last token of the prompt, and one that all tokens of the image share
    if positions is None or -(-longest // MULTIPLE) * MULTIPLE + 2 <= positions[0]:
        return None
    most = (positions[0] - 2) // MULTIPLE * MULTIPLE
    return (
        f"the transformer has positions for {most} tokens of a prompt (axes_lens in transformer/config.json)"
    )


class ZImage(DiffusersModel):
    """A Z-Image or Z-Image-Turbo pipeline (Z-Image Team 2025, arXiv:2511.22699)."""

    type: Literal["z_image"] = "z_image"
    pipelines: ClassVar = ("ZImagePipeline",)
    flow: ClassVar = ZImageFlowModel
    packing: ClassVar = 2
    unencoded: ClassVar = frozenset({"cfg_normalization"})
    template: ClassVar = QWEN

    max_sequence_length: int = Field(default=512, ge=1)
    """Tokens of a prompt within the chat template, in training and evaluation. Shorter prompts are stored as
    so many tokens and drawn without their padding; longer ones are cut."""
    cfg_normalization: float = Field(default=0.0, ge=0)
    """The greatest norm of a guided velocity, as a multiple of the norm of the velocity with the prompt; 0:
    any norm, as diffusers' default. Z-Image's model card draws with 1 (``cfg_normalization=True``)."""

    def single_file(self) -> SingleFile:
        return Z_IMAGE

    def guidance_rule_of(self, transformer: Any) -> ClassifierFree:
        return Added(self.cfg_normalization)

    def field_problems(self) -> Mapping[str, str]:
        transformer = (configs_at(self.path, self.revision) or {}).get("transformer", {})
        reason = _too_long(self.max_sequence_length, transformer)
        problems = super().field_problems()
        return problems if reason is None else {**problems, "max_sequence_length": reason}

    def longest_side(self, transformer: Any, factor: int) -> int | None:
        positions = transformer.get("axes_lens")
        return positions and min(positions[1:]) * self.divisor_of(transformer, factor)
