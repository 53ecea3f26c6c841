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
            metavar="MODEL",
            help="A run's or stage's folder, a checkpoint, a diffusers folder, or a hub name.",
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
        Path | None,
        typer.Option(help="The folder to write. Default: runs/eval-MODEL, then runs/eval-MODEL-2 ..."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, max=1024, help="Number of processes, each on its own GPU.")
    ] = 1,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Sample images for prompts, score them, and write records, a result card and the images.

    What is not given is taken from the recipe of the run that trained the model. The same command resumes an
    interrupted evaluation; one with other settings gets a folder of its own.
    """
    del debug
    from posttrain.distributed.environment import rank_and_world_size
    from posttrain.distributed.launch import run_in_processes
    from posttrain.evaluation.evaluate import Share, evaluate, evaluate_apart
    from posttrain.stages.artifact import open_sampler
    from posttrain.stages.evaluation_origin import Asked, settled_evaluation
    from posttrain.support.device import resolve, set_tf32
    from posttrain.support.heartbeat import CHILD
    from posttrain.support.terminal import note

    _check_options(weights, processes, device, output)
    asked = Asked(suite, like, prompts, tuple(reward or ()), tuple(overrides or ()))
    settings, lines = settled_evaluation(model, asked, base)
    own_share, console = Share(*rank_and_world_size()), terminal()
    if own_share.rank == 0 and CHILD not in os.environ:  # the process that started this one says it
        for line in lines:
            note(console, line)
    if processes > 1:
        run_in_processes(processes)  # afterwards the evaluation below is finished, and is only shown
    set_tf32(False)
    sampler, used = open_sampler(model, resolve(device), settings, base, weights)
    if output is not None:
        card = evaluate(
            sampler, settings, output, name=output.name, weights=used, console=console, share=own_share
        )
    else:
        folder = Path("runs") / _default_name(model, suite)
        output, card = evaluate_apart(
            sampler, settings, folder, weights=used, console=console, share=own_share
        )
    if processes == 1 and card is not None and not sampler.forward_equivalents:
        note(console, f"{output}: was finished before, so nothing is sampled; to sample again, remove it")
    _show(console, output, card)


def _check_options(weights: str | None, processes: int, device: str, output: Path | None) -> None:
    """Raise PosttrainError if an option's value, or two together, are not allowed."""
    from posttrain.errors import PosttrainError
    from posttrain.support.paths import in_the_way

    if output is not None and (problem := in_the_way(output)) is not None:
        raise PosttrainError(f"--output: {problem}")
    if weights not in (None, "ema", "raw"):
        raise PosttrainError(f"--weights: {weights!r} is neither 'ema' nor 'raw'")
    if processes > 1 and device.startswith("cuda:"):
        raise PosttrainError(f"--device {device} is one GPU, but each process needs its own: give 'cuda'")


def _show(console: Console, target: Path, card: dict[str, Any] | None) -> None:
    """Print ``card``, the result of the evaluation in ``target``; None until the last process is done."""
    from posttrain.evaluation.report.table import card_table
    from posttrain.support.heartbeat import CHILD

    if CHILD in os.environ:
        return  # the process that started this one shows it
    if card is None:
        console.print(f"other processes are still at work; the last one writes {target}")
        return
    console.print(card_table(target.name, card))
    console.print(f"records, result card and images: {target}")


def compare_evaluations(
    evaluations: Annotated[
        list[Path], typer.Argument(metavar="A B [C...]", help="Folders of evaluations or of stages.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write an HTML page with the images side by side.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=0, max=100_000, help="Number of samples on the page.")] = 24,
    debug: DebugOption = False,
) -> None:
    """Compare evaluations on the samples that they share.

    Prints the differences from A with 95 % intervals.
    """
    del debug
    from posttrain.evaluation.compare import compare_table, load
    from posttrain.evaluation.compare_page import write_page

    console = terminal()
    loaded = load(evaluations)
    console.print(compare_table(loaded))
    for line in loaded.remarks:
        console.print(line, style="yellow")
    if output is not None:
        write_page(loaded, output, prompts)
        console.print(f"page: {output}")


def _default_name(model: str, suite: str | None) -> str:
    """``eval-RUN-STAGE-SUITE``, from the last two folders of the model's path; of a checkpoint
    ``eval-RUN-STAGE-STEP-SUITE``."""
    from posttrain.weights.run_folders import last_stage

    path = Path(model)
    if (stage := last_stage(path)) is not None:
        path = path / stage
    folders = [part for part in path.parts if part not in ("/", ".", "..", "final", "checkpoints")]
    shown = 3 if path.parent.name == "checkpoints" else 2
    return "-".join(["eval", *folders[-shown:], *([suite] if suite else [])])
