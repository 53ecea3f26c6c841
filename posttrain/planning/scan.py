"""Reads every image of a recipe for ``posttrain check --data``: lists bad ones, and sums the others up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.data.lines import one_for_each_row
from posttrain.data.workers import Seen
from posttrain.errors import DataError
from posttrain.planning.image_facts import facts, kinds
from posttrain.support.progress import stage_progress
from posttrain.support.wording import counted

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.recipe.schema import Recipe


def scan_data(recipe: Recipe, console: Console) -> None:
    """Read every image of every stage. Print each bad row with its file, line and reason, then what the
    images are and how long an epoch is, with warnings.

    Raises DataError if a stage has more bad rows than its ``data.tolerance`` allows.
    """
    for stage in recipe.stages:
        if not (sources := stage.data.to_scan((recipe.model.sides() or (1,))[0])):
            if stage.data.images_per_sample:
                console.print(
                    f"{stage.name}: the run makes its images first, so none is read", highlight=False
                )
            continue
        # list all bad rows first, and apply the tolerance at the end
        seen: list[dict[int, Seen]] = [{} for _ in sources]
        problems, done = [], 0
        with stage_progress(
            f"{stage.name}: reading", sum(len(s.records) for s in sources), 0, console
        ) as bar:
            for source, known in zip(sources, seen, strict=True):
                problems += source.scan(lambda read, _, before=done: bar.update(before + read), known)
                done += len(source.records)
        problems, first = one_for_each_row(problems), sources[0]
        for problem in problems:
            _print(console, problem.located(first.spec.images))
        rows, tolerance = first.rows, getattr(stage.data, "tolerance", 0.0)
        bad = f"{len(problems)} of them bad" + (f": {kinds(problems)}" if problems else "")
        summary = f"{first.spec.images} ({first.layout}): {counted(rows, 'row')}, {bad}"
        told, warnings = facts(stage, recipe.model, sources, seen)
        for line in (summary, *told):
            _print(console, f"{stage.name}: {line}")
        for line in warnings:
            _print(console, f"{stage.name}: warning: {line}", "yellow")
        if len(problems) > tolerance * rows:
            raise DataError(
                f"{stage.name}: {len(problems)} of {rows} rows cannot be used, more than the "
                f"tolerated {tolerance:.1%} (data.tolerance)"
            )


def _print(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)
