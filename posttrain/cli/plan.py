"""Defines ``posttrain plan``, which counts memory, time and disk of a recipe before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import DebugOption, RecipeArgument, number, terminal


def plan_resources(
    recipe: RecipeArgument,
    gpu: Annotated[
        str | None, typer.Option(help='The GPU, such as "H100 80GB". Default: this machine.')
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of GPUs.")] = 1,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU that --gpu does not know, such as 48GB.")
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e6, callback=number, help="Dense bf16 TFLOP/s of that GPU."),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1,
            callback=number,
            help="Fraction of the peak throughput that is sustained. Default: as measured, or 0.4.",
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="Read the MFU from a file that a benchmark wrote with --output.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Set a field of the recipe. Repeatable."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Count the memory, time and disk that a recipe needs on given GPUs.

    If a stage does not fit, list the settings with which it would.
    """
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.planning.budget import Budget
    from posttrain.planning.gpus import custom, here
    from posttrain.planning.gpus import gpu as known_gpu
    from posttrain.planning.rates import Rates, shipped_rates
    from posttrain.planning.store import store_of
    from posttrain.planning.tables import resources
    from posttrain.recipe.file import load_recipe
    from posttrain.stages.processes import check_processes

    if (memory is None) != (tflops is None):
        raise PosttrainError("--memory and --tflops describe a GPU together: give both, or --gpu NAME")
    if memory is not None and gpu is not None:
        raise PosttrainError("--gpu and --memory both name the GPU to plan for: give one of them")
    if mfu is not None and measured is not None:
        raise PosttrainError("--mfu and --measured both set the MFU: give one of them")
    loaded = load_recipe(recipe, overrides or (), checks=False)
    check_processes(loaded, gpus)
    if memory is not None and tflops is not None:
        device = custom(memory, tflops)
    else:
        device = here() if gpu is None else known_gpu(gpu)
    source = "given"
    if measured is not None:
        mfu, source = _measured(measured), f"measured, {measured}"
    cuda = "CPU" not in device.name
    # the rows were measured on GPUs
    rates = shipped_rates() if cuda else Rates()
    budget = Budget(device, gpus, mfu, source, loaded.tf32, rates)
    with store_of(loaded.model) as store:
        terminal().print(resources(loaded, budget, cuda=cuda, store=store))


def _measured(file: Path) -> float:
    """The MFU in the file that a benchmark wrote. Raises PosttrainError if there is none."""
    import json

    from posttrain.errors import PosttrainError

    try:
        mfu = float(json.loads(file.read_text(encoding="utf-8"))["engine"]["mfu"])
        if not 0 < mfu < float("inf"):
            raise ValueError(f"its engine.mfu is {mfu:g}")
        return mfu
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PosttrainError(f"--measured: {str(file)!r} is no result of a benchmark: {error}") from error
