"""Defines ``posttrain status``, which tells how far a run is, also while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.options import DebugOption, terminal
from posttrain.support.wording import duration

if TYPE_CHECKING:
    from posttrain.stages.status import RunStatus, StageStatus


def show_status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/quickstart.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Tell how far a run is, also while it runs: step, rate, time left, scores, alarms, checkpoint.

    The step and its figures are those of the last record (train.log_every).
    """
    del debug
    from dataclasses import asdict

    from rich.text import Text

    from posttrain.stages.status import status_of

    status = status_of(run)
    if as_json:
        typer.echo(json.dumps({**asdict(status), "finished": status.finished}, indent=2))
        return
    console = terminal()
    console.print(Text(f"{status.name}: {in_words(status)}", style="bold"), soft_wrap=True)
    width = max((len(stage.name) for stage in status.stages), default=0)
    for stage in status.stages:
        first, *more = lines_of(stage)
        console.print(Text.assemble((f"{stage.name:<{width}}  ", "bold"), first), soft_wrap=True)
        for line in more:
            style = "yellow" if line.startswith(("alarm", "damaged")) or "refused" in line else "dim"
            console.print(Text(f"{'':<{width}}  {line}", style), soft_wrap=True)


def in_words(status: RunStatus) -> str:
    """Whether the run goes on, and what to do if not."""
    if status.running:
        return "running"
    if status.finished:
        return "finished"
    known = "no process is at work" if status.running is False else "whether a process is at work is unknown"
    return f"not finished, {known}. To go on, give the command that began it again"


def lines_of(stage: StageStatus) -> Iterator[str]:
    """What is known of a stage: its state, then a line for each other thing."""
    yield "  ".join([stage.state, *_progress(stage)])
    if stage.scores:
        yield f"evaluated: {_figures(stage.scores)}"
    if stage.state != "finished" and stage.held_out:
        yield f"held out: {_figures(stage.held_out)}"
    if stage.state == "training" and stage.checkpoint is not None:
        yield f"last checkpoint: step {stage.checkpoint}, {duration(stage.seconds_since_checkpoint)} ago"
    if stage.refused_steps:
        yield f"refused steps: {stage.refused_steps}"
    yield from (f"alarm: {alarm}" for alarm in stage.alarms)
    yield from (f"damaged: {line}" for line in stage.damage)


def _progress(stage: StageStatus) -> Iterator[str]:
    if stage.evaluated is not None:
        yield "image {} of {}".format(*stage.evaluated)
    if stage.step is not None:
        steps = f"step {stage.step} of {stage.steps}"
        yield steps if stage.state == "training" else f"{stage.step} steps"
    elif stage.state == "training":
        yield f"no step recorded yet, of {stage.steps}"
    if stage.state == "training":
        yield from (f"{name} {value:.4f}" for name, value in stage.metrics.items())
    if stage.images_per_second is not None and stage.state in ("training", "trained"):
        yield f"{stage.images_per_second:.1f} images/s"
    if stage.seconds_left is not None:
        yield f"{duration(stage.seconds_left)} left"
    if stage.state == "training" and stage.seconds_since_record is not None:
        yield f"recorded {duration(stage.seconds_since_record)} ago"


def _figures(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
