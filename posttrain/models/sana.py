"""Defines SANA: latents of 32 x 32 pixels, linear attention, and prompts read by a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import ModelError
from posttrain.flow.rectified import shift_sigma
from posttrain.model import DtypeName, FlowModel, torch_dtype
from posttrain.models._diffusers import DiffusersModel
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._fitting import check_output, check_settings, check_widths

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.condition import Condition

NO_VARIANCE = -400.0
"""Log-variance of a deterministic encoder: finite, and its standard deviation is 0 in float32."""


class SanaFlowModel(DiffusersFlowModel):
    """A loaded SANA pipeline."""

    spec: Sana
    shifts = ("shift", "flow_shift")

    def encode(self, prompts: list[str]) -> Condition:
        import torch

        # guidance takes the empty prompt without the instruction, as the pipeline's negative prompt
        plain = torch.tensor([not prompt for prompt in prompts], device=self.device)
        embeds, mask = self._embedded(prompts, self.instruction)
        if any(not prompt for prompt in prompts):
            without, its_mask = self._embedded(prompts, [])
            embeds = torch.where(plain[:, None, None], without, embeds)
            mask = torch.where(plain[:, None], its_mask, mask)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def _embedded(self, prompts: list[str], instruction: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (n, max_sequence_length, width) and mask (n, max_sequence_length) after the
        ``instruction``."""
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return embeds, mask

    @property
    def instruction(self) -> list[str]:
        """The lines that are put before every prompt but the empty one."""
        import inspect

        if (own := self.spec.complex_human_instruction) is not None:
            return own
        return inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.forward_dtype or self.transformer.dtype
        return self.module(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
            encoder_attention_mask=condition["encoder_attention_mask"],
            timestep=1000 * self.transformer.config.timestep_scale * sigma,
            return_dict=False,
        )[0].float()

    def encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.vae.encode(pixels).latent
        return mean, mean.new_full(mean.shape, NO_VARIANCE)

    def sigma(self, t: Tensor, size: Sequence[int]) -> Tensor:
        config = self.scheduler.config
        return shift_sigma(t, config.flow_shift) if "flow_shift" in config else super().sigma(t, size)

    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        if "flow_shift" not in self.scheduler.config:
            return super().sigmas(steps, height, width)
        # diffusers' DPM scheduler has this grid with every time but the last multiplied by 0.999
        return FlowModel.sigmas(self, steps, height, width)

    def check(self) -> None:
        scheduler, config = self.scheduler.config, self.transformer.config
        flow = scheduler.get("use_flow_sigmas") and scheduler.prediction_type == "flow_prediction"
        if "shift" not in scheduler and not flow:
            raise ModelError(
                f"scheduler/scheduler_config.json: a {type(self.scheduler).__name__} without "
                "use_flow_sigmas: true and prediction_type: flow_prediction has no flow sigmas"
            )
        check_settings("transformer", config, {"guidance_embeds": False}, "for SANA it is")
        channels = self.vae.config.latent_channels
        check_widths(config, ("vae", "its latent channels are", channels, "in_channels"))
        check_output(config)
        width = self.pipeline.text_encoder.config.hidden_size
        if width != config.caption_channels:
            raise ModelError(
                f"text_encoder does not fit: its width is {width}, the transformer takes "
                f"{config.caption_channels}"
            )


class Sana(DiffusersModel):
    """A SANA or SANA 1.5 pipeline (Xie et al. 2024, arXiv:2410.10629)."""

    type: Literal["sana"] = "sana"
    pipelines: ClassVar = ("SanaPipeline",)
    flow: ClassVar = SanaFlowModel
    in_comfyui: ClassVar = False  # Comfy-Org/ComfyUI's issue 6136, which asks for it, is open

    max_sequence_length: int = Field(default=300, ge=2, le=1024)
    """Tokens of a prompt that the transformer sees, its beginning included. Longer prompts are cut off."""
    complex_human_instruction: list[str] | None = None
    """Lines that are put before a prompt, so that the language model reads it as a request for an image.
    Default: those of diffusers' SanaPipeline. An empty list puts none. The empty prompt of guidance has
    none, as in diffusers."""

    def call_settings(self) -> dict[str, Any]:
        # the pipeline would draw at the nearest of its own sizes, and scale the image
        own: dict[str, Any] = {
            "max_sequence_length": self.max_sequence_length,
            "use_resolution_binning": False,
        }
        if self.complex_human_instruction is not None:
            own["complex_human_instruction"] = self.complex_human_instruction
        return own

    def _dtypes(self, transformer_dtype: DtypeName) -> dict[str, torch.dtype]:
        # Gemma 2 is published in bf16; diffusers' examples keep it there beside a transformer in fp16
        text: DtypeName = "bf16" if self.dtype == "fp16" else self.dtype
        return {**super()._dtypes(transformer_dtype), "text_encoder": torch_dtype(text)}
