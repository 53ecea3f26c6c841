"""Samples the images of an evaluation with a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.sampler import Sampler
from posttrain.support.randomness import generator
from posttrain.weights.files import hash_of

if TYPE_CHECKING:
    from posttrain.flow.sampling_settings import Sampling


class PipelineSampler(Sampler):
    """Calls a pipeline with one generator for each image, seeded by the image's prompt and index."""

    def __init__(self, pipeline: Any, denoiser: str, source: str, settings: dict[str, Any]) -> None:
        self.pipeline, self.source, self.settings = pipeline, source, settings
        self.device = pipeline.device
        self.denoiser = getattr(pipeline, denoiser)
        self.divisor = pipeline.vae_scale_factor
        self.forward_equivalents = 0
        self.denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    @torch.no_grad()
    def images(self, prompts: Sequence[str], indices: Sequence[int], settings: Sampling) -> Tensor:
        pairs = zip(prompts, indices, strict=True)
        generators = [generator(settings.seed, "evaluation", p, i) for p, i in pairs]
        output = self.pipeline(
            prompt=list(prompts),
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=generators,
            output_type="pt",
        )
        return output.images.float().clamp(0, 1)

    def fingerprint(self) -> str:
        return hash_of(dict(self.denoiser.named_parameters()))

    def _count(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        del module
        rows: Tensor = args[0] if args else kwargs["hidden_states"]
        self.forward_equivalents += len(rows)
