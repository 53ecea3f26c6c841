"""``posttrain eval`` and ``compare``: how good is a model, and is it better than another?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import BaseOption, DebugOption, DeviceOption, terminal


def evaluate_model(
    model: Annotated[
        str, typer.Argument(help="A stage's folder or checkpoint, a diffusers folder, or a hub name.")
    ],
    suite: Annotated[
        str | None, typer.Option(help="A published evaluation: geneval, ocr, pickscore or drawbench.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Take the settings of its evaluation.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A text file, one prompt a line, or GenEval-format JSONL.")
    ] = None,
    reward: Annotated[list[str] | None, typer.Option(help="What to score with. Repeatable.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A=B", help="A field of the evaluation, e.g. steps=20."),
    ] = None,
    base: BaseOption = None,
    weights: Annotated[str | None, typer.Option(help="Of a checkpoint: ema or raw.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write; runs/eval-MODEL by default.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="How many share the work, each on its GPU.")] = 1,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Sample prompts, score the images, and write records, result card and images.

    Given again, it goes on where it stopped.
    """
    del debug
    from posttrain.distributed.environment import rank_and_world_size
    from posttrain.distributed.launch import CHILD, run_in_processes
    from posttrain.errors import PosttrainError
    from posttrain.evaluation.evaluate import evaluate
    from posttrain.evaluation.report.page import card_table
    from posttrain.recipe.file import evaluation_settings
    from posttrain.stages.artifact import open_sampler
    from posttrain.support.device import resolve, set_tf32

    if weights not in (None, "ema", "raw"):
        raise PosttrainError(f"--weights: {weights!r} is neither 'ema' nor 'raw'")
    console = terminal()
    settings = evaluation_settings(suite, like, prompts, reward or (), overrides or ())
    parts = [p for p in Path(model).parts if p not in ("/", ".", "..", "final")]
    name = "-".join(["eval", *parts[-2:], *([suite] if suite else [])])
    target = output or Path("runs") / name
    rank, world = rank_and_world_size()
    if processes > 1:
        if device.startswith("cuda:"):
            raise PosttrainError(f"--device {device} is one GPU, and each process has its own: give 'cuda'")
        run_in_processes(processes)
    set_tf32(False)
    sampler, found = open_sampler(model, resolve(device), settings, base, weights)
    card = evaluate(
        sampler, settings, target, name=target.name, weights=found, console=console, rank=rank, world=world
    )
    if CHILD in os.environ:
        return
    if card is None:
        console.print(f"other processes are still at it; the last one writes {target}", highlight=False)
        return
    console.print(card_table(target.name, card))
    console.print(f"records, result card and images: {target}", highlight=False)


def compare_evaluations(
    evaluations: Annotated[
        list[Path], typer.Argument(metavar="A B [C...]", help="Folders of evaluations, or of stages.")
    ],
    output: Annotated[Path | None, typer.Option(help="Write a page with the images side by side.")] = None,
    prompts: Annotated[int, typer.Option(min=0, help="How many prompts the page shows.")] = 24,
    debug: DebugOption = False,
) -> None:
    """Compare evaluations on the samples that they share: differences from A, with 95 % intervals."""
    del debug
    from posttrain.evaluation.compare import compare_table, load, write_page

    console = terminal()
    loaded = load(evaluations)
    console.print(compare_table(loaded))
    for line in loaded.remarks:
        console.print(f"[yellow]{line}[/yellow]", highlight=False)
    if output is not None:
        write_page(loaded, output, prompts)
        console.print(f"page: {output}", highlight=False)
