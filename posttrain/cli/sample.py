"""Defines ``posttrain sample``, which draws images of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import MAX_SEED, MAX_SIDE, BaseOption, DebugOption, DeviceOption, terminal


def draw_samples(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run's or stage's folder, a diffusers folder, or a hub name."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="The prompt. Repeatable. Default: the first 8 of the run's recipe."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The folder for the images. Default: samples, or samples-2 where that exists."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=10_000, help="Images for each prompt.")] = 4,
    resolution: Annotated[
        int | None, typer.Option(min=8, max=MAX_SIDE, help="Side of the images in pixels.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=10_000, help="Number of sampling steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; 1 is none (Z-Image: 0).")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="euler, dpm1 or dpm2.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="Seed of the initial noise.")] = None,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Sample images for prompts and write them with a grid.

    What is not given is taken from the recipe of the run that trained the model, so that the images are those
    of its evaluation; of another model from its own image size, and 40 steps with guidance 4.5. The output
    says which is which.
    """
    del debug
    from posttrain.stages.samples import SampleSettings, draw
    from posttrain.support.paths import first_free
    from posttrain.support.wording import counted

    output = output or first_free(Path("samples"))
    settings = SampleSettings(images, resolution, steps, guidance, solver, seed, base, device)
    files = draw(model, prompt or (), output, settings, terminal())
    terminal().print(f"wrote {counted(len(files), 'image')} and grid.png to {output}", soft_wrap=True)
