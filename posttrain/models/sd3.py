"""Defines Stable Diffusion 3 and 3.5 in diffusers' folder format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.guidance import UNGUIDED, ClassifierFree
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._fitting import check_output, check_widths
from posttrain.models._outline import configs_at
from posttrain.models._sd3_layout import single_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.weights.single_file import SingleFile

TURBO = "stabilityai/stable-diffusion-3.5-large-turbo"
"""Its model card has guidance 0 and 4 steps; diffusers guides by scales over 1 alone."""
T5 = frozenset({"text_encoder_3", "tokenizer_3"})


class SD3FlowModel(DiffusersFlowModel):
    """A loaded Stable Diffusion 3 pipeline."""

    spec: SD3

    def __init__(self, spec: SD3, pipeline: Any, source: Path, device: torch.device) -> None:
        super().__init__(spec, pipeline, source, device)
        self.guidance_rule = spec.guidance_rule()

    def encode(self, prompts: list[str]) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=prompts,
            prompt_3=prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.forward_dtype or self.transformer.dtype
        return self.module(
            hidden_states=latents.to(dtype),
            timestep=1000 * sigma,
            return_dict=False,
            **{name: tensor.to(dtype) for name, tensor in condition.items()},
        )[0].float()

    def check(self) -> None:
        pipeline, config = self.pipeline, self.transformer.config
        channels = self.vae.config.latent_channels
        check_widths(config, ("vae", "its latent channels are", channels, "in_channels"))
        check_output(config)
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            raise ModelError("the pipeline has no CLIP text encoders; only text_encoder_3 may be missing")
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
                f"text encoders do not fit: the CLIP widths {[c.hidden_size for c in clip]} add up to "
                f"{width}, over the transformer's {config.joint_attention_dim}"
            )
        if (t5 := pipeline.text_encoder_3) is not None and t5.config.d_model != config.joint_attention_dim:
            raise ModelError(
                f"text_encoder_3 does not fit: its width is {t5.config.d_model}, "
                f"the transformer takes {config.joint_attention_dim}"
            )


class SD3(DiffusersModel):
    """A Stable Diffusion 3 / 3.5 pipeline (Esser et al. 2024, arXiv:2403.03206)."""

    type: Literal["sd3"] = "sd3"
    pipelines: ClassVar = ("StableDiffusion3Pipeline",)
    flow: ClassVar = SD3FlowModel
    optional: ClassVar = T5
    buffers: ClassVar = frozenset({"pos_embed.pos_embed"})
    unencoded: ClassVar = frozenset({"text_encoder_3"})  # the cache's name lists the components, T5 too

    max_sequence_length: int = Field(default=256, ge=1, le=512)
    """Maximum tokens of a prompt in T5, in training and evaluation. The published runs trained with 77 (SOAR)
    or 128 (Flow-GRPO, DiffusionNFT) and evaluated with 256."""
    text_encoder_3: bool = True
    """False leaves out the T5 encoder, as diffusers allows; its embeddings are then zeros."""

    def single_file(self) -> SingleFile | None:
        configs = configs_at(self.path, self.revision)
        return None if configs is None else single_file(configs["transformer"]["num_layers"])

    def guidance_rule(self) -> ClassifierFree:
        # nothing in its folder tells the distilled model from Large
        return UNGUIDED if self.path == TURBO else super().guidance_rule()

    def left_out(self) -> frozenset[str]:
        return frozenset() if self.text_encoder_3 else T5
