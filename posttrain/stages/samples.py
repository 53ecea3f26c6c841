"""``posttrain sample``: draw some images of a model and save them with a grid."""

from __future__ import annotations

from collections.abc import Sequence
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


SLICE = 8
"""Images drawn at a time, which bounds the memory."""


def draw(
    model: str,
    prompts: Sequence[str],
    output: Path,
    images: int,
    resolution: int,
    steps: int,
    guidance: float,
    solver: str,
    seed: int,
    base: str | None,
    device: str,
    console: Console,
) -> list[Path]:
    """Write ``images`` images of each prompt to ``output``, and ``grid.png``; returns the images' files.

    Image i of a prompt starts from the same noise whatever the model. Raises PosttrainError.
    """
    import torch

    if solver not in get_args(Solver):
        raise PosttrainError(f"--solver: no solver {solver!r}; there are {', '.join(get_args(Solver))}")
    settings = Sampling(
        resolution=resolution,
        steps=steps,
        guidance=guidance,
        solver=solver,  # type: ignore[arg-type]
        seed=seed,
    )
    set_tf32(False)
    sampler, _ = open_sampler(model, resolve(device), settings, base)
    if resolution % sampler.divisor:
        raise PosttrainError(f"--resolution: {resolution} is no multiple of {sampler.divisor}")
    files, drawn = [], []
    output.mkdir(parents=True, exist_ok=True)
    with stage_progress("sample", len(prompts) * images, 0, console) as bar:
        for number, prompt in enumerate(prompts):
            parts = [range(images)[i : i + SLICE] for i in range(0, images, SLICE)]
            batch = torch.cat([sampler.images([prompt] * len(p), p, settings).cpu() for p in parts])
            drawn.append(batch)
            for index, image in enumerate(to_pil(batch)):
                files.append(output / f"{number:03d}-{index:02d}.png")
                image.save(files[-1])
            bar.update(len(files))
    captions = [prompt for prompt in prompts for _ in range(images)]
    grid(torch.cat(drawn), images, captions=captions).save(output / "grid.png")
    return files
