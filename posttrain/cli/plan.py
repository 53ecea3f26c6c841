"""``posttrain plan``: what a recipe needs, before anything is bought, fetched or run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import DebugOption, RecipeArgument, terminal


def plan_resources(
    recipe: RecipeArgument,
    gpu: Annotated[
        str | None, typer.Option(help='Such as "H100 80GB"; by default this machine is planned for.')
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    memory: Annotated[str | None, typer.Option(help="Of a GPU that has no name here, such as 48GB.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="Its dense bf16 TFLOP/s.")] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.001, max=1, help="Share of the peak that is sustained; 0.4.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Take the MFU from what a benchmark wrote with --output.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Change a field of the recipe. Repeatable."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Count memory, time and disk of a recipe on given GPUs, and say what would make it fit."""
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.planning.gpus import custom, here
    from posttrain.planning.gpus import gpu as known
    from posttrain.planning.tables import ASSUMED_MFU, Budget, resources
    from posttrain.recipe.file import load_recipe
    from posttrain.stages.processes import check_processes

    if (memory is None) != (tflops is None):
        raise PosttrainError("--memory and --tflops describe a GPU together: give both, or --gpu NAME")
    if memory is not None and gpu is not None:
        raise PosttrainError("--gpu and --memory both say what to plan for: give one of them")
    if mfu is not None and measured is not None:
        raise PosttrainError("--mfu and --measured both say how fast it is: give one of them")
    loaded = load_recipe(recipe, overrides or (), checks=False)
    check_processes(loaded, gpus)
    if memory is not None and tflops is not None:
        device = custom(memory, tflops)
    else:
        device = here() if gpu is None else known(gpu)
    share, source = (ASSUMED_MFU, "assumed") if mfu is None else (mfu, "given")
    if measured is not None:
        share, source = _measured(measured), f"measured, {measured}"
    cuda = "CPU" not in device.name
    terminal().print(resources(loaded, Budget(device, gpus, share, source, loaded.tf32), cuda=cuda))


def _measured(file: Path) -> float:
    """The MFU in a benchmark's result."""
    import json

    from posttrain.errors import PosttrainError

    try:
        return float(json.loads(file.read_text())["engine"]["mfu"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PosttrainError(f"--measured: {str(file)!r} is no result of a benchmark: {error}") from error
