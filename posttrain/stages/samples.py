"""Draws images of a model and saves them with a grid (``posttrain sample``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from posttrain.errors import PosttrainError
from posttrain.flow.sampling_settings import Sampling
from posttrain.flow.solvers import Solver
from posttrain.stages.artifact import open_sampler
from posttrain.support.device import resolve, set_tf32
from posttrain.support.images import grid, to_pil
from posttrain.support.progress import stage_progress

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from posttrain.model import Sampler

IMAGES_AT_A_TIME = 8
"""Bounds the memory; it does not change the images."""


@dataclass(frozen=True)
class SampleSettings:
    """The options of ``posttrain sample``."""

    images: int = 4
    """Images per prompt."""
    resolution: int = 512
    """Side in pixels."""
    steps: int = 40
    """Sampling steps."""
    guidance: float = 4.5
    """Classifier-free guidance scale; 1 is none."""
    solver: str = "euler"
    seed: int = 0
    """Of the noise."""
    base: str | None = None
    """The model that a LoRA belongs to, in place of the one that its artifact names."""
    device: str = "auto"

    def sampling(self) -> Sampling:
        """The settings that a sampler takes. Raises PosttrainError for a solver that does not exist."""
        if self.solver not in get_args(Solver):
            allowed = ", ".join(get_args(Solver))
            raise PosttrainError(f"--solver: no solver {self.solver!r}; there are {allowed}")
        return Sampling(
            resolution=self.resolution,
            steps=self.steps,
            guidance=self.guidance,
            solver=self.solver,  # type: ignore[arg-type]
            seed=self.seed,
        )


def draw(
    model: str, prompts: Sequence[str], output: Path, settings: SampleSettings, console: Console
) -> list[Path]:
    """Write the images of each prompt to ``output``, and ``grid.png``; returns the images' files.

    ``model`` is what :func:`posttrain.stages.artifact.open_artifact` opens. Image i of a prompt starts from
    the same noise whatever the model. Raises PosttrainError.
    """
    import torch

    sampling = settings.sampling()
    set_tf32(False)
    sampler, _ = open_sampler(model, resolve(settings.device), sampling, settings.base)
    if settings.resolution % sampler.divisor:
        raise PosttrainError(f"--resolution: {settings.resolution} is no multiple of {sampler.divisor}")
    files, drawn = [], []
    output.mkdir(parents=True, exist_ok=True)
    with stage_progress("sample", len(prompts) * settings.images, 0, console) as bar:
        for number, prompt in enumerate(prompts):
            drawn.append(_images_of(prompt, settings.images, sampler, sampling))
            for index, image in enumerate(to_pil(drawn[-1])):
                files.append(output / f"{number:03d}-{index:02d}.png")
                image.save(files[-1])
            bar.update(len(files))
    captions = [prompt for prompt in prompts for _ in range(settings.images)]
    grid(torch.cat(drawn), settings.images, captions=captions).save(output / "grid.png")
    return files


def _images_of(prompt: str, count: int, sampler: Sampler, sampling: Sampling) -> Tensor:
    """(count, 3, h, w) images of ``prompt`` in [0, 1], in the CPU's memory."""
    import torch

    indices = [range(count)[i : i + IMAGES_AT_A_TIME] for i in range(0, count, IMAGES_AT_A_TIME)]
    return torch.cat([sampler.images([prompt] * len(some), some, sampling).cpu() for some in indices])
