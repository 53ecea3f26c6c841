"""Draws images of a model and saves them with a grid (``posttrain sample``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from posttrain.data.lines import text_problem
from posttrain.errors import PosttrainError
from posttrain.flow.sampling_settings import Sampling
from posttrain.flow.solvers import Solver
from posttrain.reward import check_finite
from posttrain.stages.artifact import open_sampler
from posttrain.stages.origin import SAMPLING, Source, first_prompts, settled, sources_of
from posttrain.support.device import resolve, set_tf32
from posttrain.support.files import write
from posttrain.support.images import grid, grid_png, png, to_pil
from posttrain.support.paths import expanded, in_the_way, is_folder
from posttrain.support.progress import stage_progress
from posttrain.support.terminal import note
from posttrain.support.wording import counted
from posttrain.weights.pipeline_folder import SHIPPED
from posttrain.weights.run_folders import meaning_of

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from posttrain.sampler import Sampler

GRID = "grid.png"
IMAGES_AT_A_TIME = 8
"""Bounds the memory; it does not change the images."""
PROMPTS = 8
"""Prompts of the run's recipe that are drawn where none is given."""


@dataclass(frozen=True)
class SampleSettings:
    """The options of ``posttrain sample``. For None, the run's recipe or the model says what is taken."""

    images: int = 4
    """Images per prompt."""
    resolution: int | None = None
    """Side in pixels."""
    steps: int | None = None
    """Sampling steps."""
    guidance: float | None = None
    """Guidance scale; 1 is none."""
    solver: str | None = None
    seed: int | None = None
    """Of the noise."""
    base: str | None = None
    """The model that a LoRA belongs to, in place of the one that its artifact names."""
    device: str = "auto"

    def given(self) -> dict[str, Any]:
        """The settings of sampling that are not None. Raises PosttrainError for a solver that does not exist,
        or a guidance that is not finite."""
        if self.solver not in (None, *get_args(Solver)):
            allowed = ", ".join(get_args(Solver))
            raise PosttrainError(f"--solver: no solver {self.solver!r}; there are {allowed}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise PosttrainError(f"--guidance: {self.guidance} is no finite number")
        own = {name: getattr(self, name) for name in ("resolution", "steps", "guidance", "solver", "seed")}
        return {name: value for name, value in own.items() if value is not None}


def draw(
    model: str, prompts: Sequence[str], output: Path, settings: SampleSettings, console: Console
) -> list[Path]:
    """Write the images of each prompt to ``output``, and ``grid.png``; returns the images' files.

    ``model`` is what :func:`posttrain.stages.artifact.open_artifact` opens. What ``settings`` leave open, and
    the prompts if there are none, are those of the run that it is from (:mod:`posttrain.stages.origin`); the
    console says which. Image i of a prompt starts from the same noise whatever the model. No image is
    replaced. Raises PosttrainError.
    """
    import torch

    if problem := next((p for p in map(text_problem, prompts) if p is not None), None):
        raise PosttrainError(f"--prompt {problem}")
    given = settings.given()
    if (problem := in_the_way(output)) is not None:
        raise PosttrainError(f"--output: {problem}")
    sampling, prompts = _settled(model, prompts, given, settings.base, console)
    files = [output / f"{p:03d}-{i:02d}.png" for p in range(len(prompts)) for i in range(settings.images)]
    if there := [file.name for file in (*files, output / GRID) if file.exists()]:
        raise PosttrainError(
            f"--output: {str(output)!r} has {counted(len(there), 'image')} of these names, such as "
            f"{there[0]}, and none is replaced: give another folder, or remove them"
        )
    set_tf32(False)
    sampler, _ = open_sampler(model, resolve(settings.device), sampling, settings.base)
    if sampling.resolution % sampler.divisor:
        raise PosttrainError(f"--resolution: {sampling.resolution} is no multiple of {sampler.divisor}")
    drawn, unwritten = [], iter(files)
    with stage_progress("sample", len(files), 0, console) as bar:
        for prompt in prompts:
            drawn.append(_images_of(prompt, settings.images, sampler, sampling))
            for image in to_pil(drawn[-1]):
                write(next(unwritten), png(image))
            bar.update(len(drawn) * settings.images)
    captions = [prompt for prompt in prompts for _ in range(settings.images)]
    write(output / GRID, grid_png(grid(torch.cat(drawn), settings.images, captions=captions)))
    return files


def _settled(
    model: str, prompts: Sequence[str], given: dict[str, Any], base: str | None, console: Console
) -> tuple[Sampling, list[str]]:
    """The settings and the prompts to draw; tells where they are from. Raises PosttrainError."""
    if line := meaning_of(model):
        note(console, line)
    sources = [Source("the command line", given), *sources_of(model, base)]
    chosen, lines = settled(sources, SAMPLING)
    for line in lines:
        note(console, line)
    if prompts:
        return Sampling(**chosen), list(prompts)
    source = next((source for source in sources if "prompts" in source.settings), None)
    if source is None:
        here = is_folder(expanded(model)) or model.startswith(SHIPPED)
        raise PosttrainError(
            f"say what to draw: --prompt TEXT; no recipe of a run gives prompts for {model!r}"
            + ("" if here else ", and no folder here has that name")
        )
    drawn = first_prompts(source.settings["prompts"], PROMPTS, source.place)
    note(console, f"from {source.place}: the first {len(drawn)} prompts")
    return Sampling(**chosen), drawn


def _images_of(prompt: str, count: int, sampler: Sampler, sampling: Sampling) -> Tensor:
    """(count, 3, h, w) images of ``prompt`` in [0, 1], in the CPU's memory. Raises NotFinite."""
    import torch

    indices = [range(count)[i : i + IMAGES_AT_A_TIME] for i in range(0, count, IMAGES_AT_A_TIME)]
    images = torch.cat([sampler.images([prompt] * len(some), some, sampling).cpu() for some in indices])
    check_finite(images, [prompt] * count)
    return images
