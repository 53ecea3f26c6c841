"""Defines FLUX.1 in diffusers' folder format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.flow.guidance import EMBEDDED, UNGUIDED, ClassifierFree
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._fitting import check_output, check_rope, check_settings, check_widths
from posttrain.models._flux_layout import FLUX
from posttrain.models._packing import grid_ids, packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from posttrain.condition import Condition
    from posttrain.weights.single_file import SingleFile


class FluxFlowModel(DiffusersFlowModel):
    """A loaded FLUX.1 pipeline."""

    spec: Flux
    gives_times = True

    def encode(self, prompts: list[str]) -> Condition:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=prompts,
            device=self.device,
            max_sequence_length=self.spec.max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        import torch

        dtype = self.forward_dtype or self.transformer.dtype
        embeds, guidance = condition["encoder_hidden_states"], condition.get("guidance")
        if guidance is None and self.guidance_rule.embedded:
            guidance = torch.full_like(sigma, self.spec.train_guidance)
        height, width = latents.shape[-2:]
        tokens = self.module(
            hidden_states=packed(latents).to(dtype),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=embeds.to(dtype),
            pooled_projections=condition["pooled_projections"].to(dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device),
            img_ids=grid_ids(height // 2, width // 2, latents.device),
            return_dict=False,
        )[0]
        return unpacked(tokens.float(), height, width)

    def check(self) -> None:
        pipeline, config = self.pipeline, self.transformer.config
        clip, t5 = pipeline.text_encoder.config, pipeline.text_encoder_2.config
        check_widths(
            config,
            ("text_encoder", "its width is", clip.hidden_size, "pooled_projection_dim"),
            ("text_encoder_2", "its width is", t5.d_model, "joint_attention_dim"),
            ("vae", "4 times its latent channels are", 4 * self.vae.config.latent_channels, "in_channels"),
        )
        check_settings("transformer", config, {"patch_size": 1}, "FLUX has")
        check_rope(config, "axes_dims_rope")
        check_output(config)


class Flux(DiffusersModel):
    """A FLUX.1 pipeline: dev, which takes the guidance scale as an input, or schnell, which takes none."""

    type: Literal["flux"] = "flux"
    pipelines: ClassVar = ("FluxPipeline",)
    flow: ClassVar = FluxFlowModel
    packing: ClassVar = 2
    unencoded: ClassVar = frozenset({"train_guidance"})

    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """Tokens of a prompt in T5, in training and evaluation. Padding counts as tokens, as in diffusers. dev
    was made with 512, schnell with 256."""
    train_guidance: float = Field(default=1.0, ge=0)
    """The scale that dev takes as an input in the losses on images (SFT, SOAR, DPO). At 1, as in ai-toolkit,
    SimpleTuner and kohya's guide, the images need not look like guided ones, and a LoRA keeps what the
    distillation made of greater scales; diffusers' scripts have 3.5. Online algorithms train at the scale of
    their rollout."""

    def single_file(self) -> SingleFile:
        return FLUX

    def guidance_rule_of(self, transformer: Any) -> ClassifierFree:
        # nothing is known of a model whose configuration is not here
        return EMBEDDED if not transformer or transformer.get("guidance_embeds") else UNGUIDED

    def field_problems(self) -> Mapping[str, str]:
        problems = {**super().field_problems()}
        if self.train_guidance != 1 and not self.guidance_rule().embedded:
            problems["train_guidance"] = "has no effect: this model takes no guidance scale; remove it"
        return problems
