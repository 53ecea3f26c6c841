"""Defines Stable Diffusion XL and FLUX, which can be evaluated but not trained."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from posttrain.errors import DataError, ModelError
from posttrain.model import DtypeName, FlowModel, Model, Sampler, torch_dtype
from posttrain.weights.hugging_face import explained, quiet
from posttrain.weights.pipeline_folder import local_folder, missing

if TYPE_CHECKING:
    import torch

    from posttrain.flow.sampling_settings import Sampling


class Pipeline(Model, ABC):
    """A diffusers pipeline with its own scheduler."""

    trainable: ClassVar = False
    denoiser: ClassVar[str]
    """The component that is called at every sampling step."""

    path: str = Field(min_length=1)
    """A diffusers folder or a hub name."""
    revision: str | None = None
    """A branch, tag or commit of the hub repository."""
    dtype: DtypeName | None = None
    """Precision of all components. Default: the evaluation's ``precision``."""

    def load(self, device: torch.device, transformer_dtype: DtypeName) -> FlowModel:
        raise ModelError(f"a model of type {self.type!r} can be evaluated and sampled, not trained")

    def sampler(self, device: torch.device, settings: Sampling) -> Sampler:
        from diffusers import DiffusionPipeline

        from posttrain.models._pipeline_sampler import PipelineSampler

        if settings.solver != "euler":
            raise DataError(
                f"solver {settings.solver!r}: {self.type} is sampled with its own scheduler; "
                "leave the solver at 'euler'"
            )
        dtype = torch_dtype(self.dtype or settings.precision)
        with quiet(), explained(self.path):
            folder = local_folder(self.path)
            pipeline = DiffusionPipeline.from_pretrained(
                self.path if folder is None else folder, revision=self.revision, torch_dtype=dtype
            )
        name = type(pipeline).__name__
        pipeline.watermark = None  # SDXL would mark the images if the watermark package is installed
        if name not in self.pipelines:
            raise ModelError(f"{self.path!r} is a {name}, not a {' or '.join(self.pipelines)}")
        pipeline.set_progress_bar_config(disable=True)
        return PipelineSampler(
            pipeline.to(device), self.denoiser, self.path, self.card_settings(), self.arguments(settings)
        )

    def arguments(self, settings: Sampling) -> dict[str, Any]:
        """Arguments of the pipeline's call beside prompts, size, steps and guidance."""
        del settings
        return {}

    def missing(self) -> str | None:
        return missing(self.path, self.denoiser, self.pipelines)


class SDXL(Pipeline):
    """Stable Diffusion XL (1024 px, guidance 5 to 7)."""

    type: Literal["sdxl"] = "sdxl"
    pipelines: ClassVar = ("StableDiffusionXLPipeline",)
    denoiser: ClassVar = "unet"

    def arguments(self, settings: Sampling) -> dict[str, Any]:
        if settings.guidance < 1:
            raise DataError(
                f"guidance {settings.guidance:g}: diffusers ignores guidance below 1 for SDXL; give 1 or more"
            )
        return super().arguments(settings)


class Flux(Pipeline):
    """FLUX.1. Guidance is an input of the network (dev: 3.5; schnell ignores it)."""

    type: Literal["flux"] = "flux"
    pipelines: ClassVar = ("FluxPipeline",)
    denoiser: ClassVar = "transformer"

    max_sequence_length: int = Field(512, ge=1, le=512)
    """Maximum tokens of a prompt in T5."""

    def arguments(self, settings: Sampling) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}
