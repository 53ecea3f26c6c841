"""Gives what a run wrote to Python: stages, scores, images, metrics and folders of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import PosttrainError
from posttrain.evaluation.report.results import Results, StageResult, load_results
from posttrain.evaluation.report.verdict import difference
from posttrain.recipe.schema import BASE, Recipe
from posttrain.stages.stage_state import RECIPE
from posttrain.support.spelling import meant
from posttrain.weights.run_folders import REPORT, RUN, is_run

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Score:
    """A mean over the samples of an evaluation, with its bootstrap interval."""

    mean: float
    low: float
    """Lower end of the 95 % interval; -inf of one sample, which does not tell how far others lie apart."""
    high: float
    """Upper end of the 95 % interval; inf of one sample."""


@dataclass(frozen=True)
class Picture:
    """An evaluation's image that was kept. Notebooks show it."""

    prompt: str
    path: Path

    def open(self) -> Image:
        """The image, in memory."""
        from PIL import Image

        with Image.open(self.path) as image:
            image.load()
            return image

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


class RunResult:
    """What the run in ``folder`` has written so far. It reads files alone, and loads no weights.

    Raises PosttrainError if ``folder`` holds no run, and DamagedError if a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / RECIPE).is_file():
            raise PosttrainError(f"{str(folder)!r} is no run folder: it has no {RECIPE}")
        if not is_run(folder) and is_run(folder.parent):
            raise PosttrainError(f"{str(folder)!r} is a stage's folder: open its run, {str(folder.parent)!r}")
        self.folder = folder

    @property
    def stages(self) -> list[str]:
        """``base``, and the names of the recipe's stages in order."""
        return [stage.name for stage in self._results.stages]

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of the run, with all defaults."""
        from posttrain.recipe.file import load_recipe

        return load_recipe(self.folder / RECIPE, checks=False)

    @property
    def damage(self) -> list[str]:
        """A line for each file that is damaged or missing, although the rest can be read."""
        return self._results.damage

    @property
    def report(self) -> Path:
        """The HTML page, which is written when the run ends."""
        return self.folder / REPORT

    def final(self, stage: str) -> Path:
        """The folder with the weights that ``stage`` wrote. Raises PosttrainError if it is not finished."""
        folder = self.folder / self._stage(stage).name / "final"
        if not folder.is_dir():
            reason = (
                "is the model before any stage: recipe.model names it" if stage == BASE else "is not finished"
            )
            raise PosttrainError(f"{stage!r} {reason}")
        return folder

    def scores(self, stage: str) -> dict[str, Score]:
        """Name of a score -> its mean and interval; empty if ``stage`` is not evaluated."""
        return {name: _score(values) for name, values in self._stage(stage).scores.items()}

    def gain(self, stage: str, score: str, over: str = BASE) -> Score | None:
        """The mean difference of ``stage`` and ``over`` on the samples they share, with its interval.

        None if one of them lacks the score so far, or if they were not evaluated alike: str(result) tells
        how. Raises PosttrainError if the run has scores, and none of this name.
        """
        known = sorted({name for each in self._results.stages for name in each.scores})
        if known and score not in known:
            raise PosttrainError(
                f"the run has no score {score!r}{meant(score, known)}: it has {', '.join(known)}"
            )
        found = difference(self._stage(over), self._stage(stage), score)
        return Score(*found) if found is not None else None

    def samples(self, stage: str) -> list[dict[str, Any]]:
        """The evaluated samples of ``stage``: rows with ``prompt``, ``index`` and ``scores``."""
        return self._stage(stage).samples

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The rows that ``stage`` recorded while it trained, each with its ``step``."""
        return self._stage(stage).metrics

    def cost(self, stage: str) -> Mapping[str, Any]:
        """What training ``stage`` took: ``steps``, ``seconds``, ``forward_equivalents`` and more."""
        return self._stage(stage).account

    def images(self, stage: str) -> list[Picture]:
        """The images of ``stage`` that its evaluation kept: those of its grid first."""
        return [Picture(prompt, path) for (prompt, _), path in self._stage(stage).images.items()]

    def table(self) -> list[dict[str, Any]]:
        """A row for each stage and score, as ``pandas.DataFrame`` takes them.

        Its keys are ``stage``, ``score``, ``mean``, ``low``, ``high``. A stage that shares samples with the
        base model has also ``gain_mean``, ``gain_low`` and ``gain_high``, the paired difference from it.
        """
        rows = []
        for stage in self.stages:
            for name, score in self.scores(stage).items():
                gain = self.gain(stage, name) if stage != BASE else None
                rows.append(
                    {
                        "stage": stage,
                        "score": name,
                        **vars(score),
                        **{f"gain_{key}": value for key, value in (vars(gain) if gain else {}).items()},
                    }
                )
        return rows

    def __str__(self) -> str:
        from rich.console import Console

        from posttrain.evaluation.report.table import table

        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(table(self.folder, console.width))
        return capture.get()

    def _repr_html_(self) -> str:
        """What a notebook shows: the table of the scores, and the images of the grid, small."""
        from posttrain.stages.notebook import html

        images: dict[str, dict[str, Path]] = {stage: {} for stage in self.stages}
        for stage, files in images.items():
            for picture in self.images(stage):
                files.setdefault(picture.prompt, picture.path)
        return html(self.folder, self.stages, self.table(), images)

    def __repr__(self) -> str:
        return f"RunResult({str(self.folder)!r}, stages={self.stages})"

    @cached_property
    def _results(self) -> Results:
        return load_results(self.folder)

    def _stage(self, name: str) -> StageResult:
        known = {stage.name: stage for stage in self._results.stages}
        if name not in known:
            raise PosttrainError(
                f"the run has no stage {name!r}{meant(name, list(known))}: it has "
                + (", ".join(known) or f"none, as there is no {RUN} in {str(self.folder)!r}")
            )
        return known[name]


def open_run(folder: str | Path) -> RunResult:
    """The results in the run folder ``folder``, finished or not. Raises PosttrainError if it is none."""
    return RunResult(Path(folder).absolute())


def _score(values: Mapping[str, Any]) -> Score:
    low, high = (-math.inf, math.inf) if values.get("count") == 1 else (values["low"], values["high"])
    return Score(values["mean"], low, high)
