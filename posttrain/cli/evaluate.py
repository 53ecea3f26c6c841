"""Defines ``posttrain eval``, which scores a model's images, and ``compare``, which compares evaluations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.options import BaseOption, DebugOption, DeviceOption, terminal

if TYPE_CHECKING:
    from rich.console import Console


def evaluate_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A stage's folder or checkpoint, a diffusers folder, or a hub name."
        ),
    ],
    suite: Annotated[
        str | None, typer.Option(help="A published evaluation: geneval, ocr, pickscore or drawbench.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Use the evaluation settings of this recipe.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A text file with one prompt a line, or GenEval-format JSONL.")
    ] = None,
    reward: Annotated[list[str] | None, typer.Option(help="A reward to score with. Repeatable.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A=B", help="Set a field of the evaluation, such as steps=20. Repeatable."
        ),
    ] = None,
    base: BaseOption = None,
    weights: Annotated[str | None, typer.Option(help="Which weights of a checkpoint: ema or raw.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder to write. Default: runs/eval-MODEL.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes, each on its own GPU.")] = 1,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Sample images for prompts, score them, and write records, a result card and the images.

    The same command resumes an interrupted evaluation.
    """
    del debug
    from posttrain.distributed.environment import rank_and_world_size
    from posttrain.distributed.launch import run_in_processes
    from posttrain.evaluation.evaluate import Share, evaluate
    from posttrain.recipe.file import evaluation_settings
    from posttrain.stages.artifact import open_sampler
    from posttrain.support.device import resolve, set_tf32

    _check_options(weights, processes, device)
    settings = evaluation_settings(suite, like, prompts, reward or (), overrides or ())
    target = output or Path("runs") / _default_name(model, suite)
    own_share = Share(*rank_and_world_size())
    if processes > 1:
        run_in_processes(processes)  # afterwards the evaluation below is finished, and is only shown
    set_tf32(False)
    sampler, used = open_sampler(model, resolve(device), settings, base, weights)
    console = terminal()
    card = evaluate(
        sampler, settings, target, name=target.name, weights=used, console=console, share=own_share
    )
    _show(console, target, card)


def _check_options(weights: str | None, processes: int, device: str) -> None:
    """Raise PosttrainError if an option's value, or two together, are not allowed."""
    from posttrain.errors import PosttrainError

    if weights not in (None, "ema", "raw"):
        raise PosttrainError(f"--weights: {weights!r} is neither 'ema' nor 'raw'")
    if processes > 1 and device.startswith("cuda:"):
        raise PosttrainError(f"--device {device} is one GPU, but each process needs its own: give 'cuda'")


def _show(console: Console, target: Path, card: dict[str, Any] | None) -> None:
    """Print ``card``, the result of the evaluation in ``target``; None until the last process is done."""
    from posttrain.distributed.launch import CHILD
    from posttrain.evaluation.report.table import card_table

    if CHILD in os.environ:
        return  # the process that started this one shows it
    if card is None:
        console.print(f"other processes are still at work; the last one writes {target}", highlight=False)
        return
    console.print(card_table(target.name, card))
    console.print(f"records, result card and images: {target}", highlight=False)


def compare_evaluations(
    evaluations: Annotated[
        list[Path], typer.Argument(metavar="A B [C...]", help="Folders of evaluations or of stages.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write an HTML page with the images side by side.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=0, help="Number of prompts on the page.")] = 24,
    debug: DebugOption = False,
) -> None:
    """Compare evaluations on the samples that they share.

    Prints the differences from A with 95 % intervals.
    """
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


def _default_name(model: str, suite: str | None) -> str:
    """``eval-RUN-STAGE-SUITE``, from the last two folders of the model's path."""
    folders = [part for part in Path(model).parts if part not in ("/", ".", "..", "final")]
    return "-".join(["eval", *folders[-2:], *([suite] if suite else [])])
