"""Defines Stable Diffusion XL, which can be evaluated but not trained."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from posttrain.errors import DataError, ModelError
from posttrain.model import DtypeName, FlowModel, Model, torch_dtype
from posttrain.models._diffusers import native_side
from posttrain.sampler import Sampler
from posttrain.weights.hugging_face import explained, quiet
from posttrain.weights.pipeline import load_pipeline
from posttrain.weights.pipeline_folder import complete_folder, config, files_of, missing, useless_revision

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
            if (folder := complete_folder(self.path, revision=self.revision)) is None:
                folder = Path(DiffusionPipeline.download(self.path, revision=self.revision))
        pipeline = load_pipeline(DiffusionPipeline, folder, {"default": dtype})
        name = type(pipeline).__name__
        pipeline.watermark = None  # SDXL would mark the images if the watermark package is installed
        if name not in self.pipelines:
            raise ModelError(f"{self.path!r} is a {name}, not a {' or '.join(self.pipelines)}")
        pipeline.set_progress_bar_config(disable=True)
        return PipelineSampler(pipeline.to(device), self.denoiser, self.path, self.card_settings())

    def native_side(self) -> int | None:
        components = (self.denoiser, "vae")
        found = {name: config(self.path, name, revision=self.revision) for name in components}
        return native_side({name: kept for name, kept in found.items() if kept is not None}, self.denoiser)

    def weight_files(self) -> Mapping[str, Path]:
        return files_of(self.path, revision=self.revision)

    def field_problems(self) -> Mapping[str, str]:
        return useless_revision(self.path, self.revision)

    def missing(self) -> str | None:
        return missing(self.path, self.denoiser, self.pipelines, revision=self.revision)


class SDXL(Pipeline):
    """Stable Diffusion XL, 1024 px, guidance 5 to 7 (Podell et al. 2023, arXiv:2307.01952)."""

    type: Literal["sdxl"] = "sdxl"
    pipelines: ClassVar = ("StableDiffusionXLPipeline",)
    denoiser: ClassVar = "unet"

    def sampler(self, device: torch.device, settings: Sampling) -> Sampler:
        if settings.guidance < 1:
            raise DataError(
                f"guidance {settings.guidance:g}: diffusers ignores guidance below 1 for SDXL; give 1 or more"
            )
        return super().sampler(device, settings)
