"""Reads every image of a recipe and lists the bad ones, for ``posttrain check --data``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.data.loader import ImageSource
from posttrain.data.settings import Images
from posttrain.errors import DataError
from posttrain.support.progress import stage_progress

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.recipe.schema import Recipe


def scan_data(recipe: Recipe, console: Console) -> None:
    """Read every image of every stage and print each bad row with its file, line and reason.

    Raises DataError if a stage has more bad rows than its ``data.tolerance`` allows.
    """
    for stage in recipe.stages:
        if not isinstance(stage.data, Images):
            continue  # the run itself renders these
        # list all bad rows first, and apply the tolerance at the end
        tolerant = stage.data.model_copy(update={"tolerance": 1.0})
        source = ImageSource(tolerant, divisor=recipe.model.divisor() or 1)
        with stage_progress(f"{stage.name}: reading", len(source.records), 0, console) as bar:
            problems = source.scan(lambda done, total: bar.update(done))
        for problem in problems:
            line = f"{stage.data.images}:{problem.line}: {problem.reason}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print(f"{stage.name}: {source.rows} rows, {len(problems)} of them bad", highlight=False)
        if len(problems) > stage.data.tolerance * source.rows:
            raise DataError(
                f"{stage.name}: {len(problems)} of {source.rows} rows cannot be used, more than the "
                f"tolerated {stage.data.tolerance:.1%} (data.tolerance)"
            )
