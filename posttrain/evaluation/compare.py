"""Compares evaluated models pair by pair, on the samples that all of them have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from posttrain.errors import PosttrainError
from posttrain.evaluation.card import differing
from posttrain.evaluation.intervals import paired_difference
from posttrain.evaluation.likeness import other_base
from posttrain.evaluation.names import distinct_names
from posttrain.evaluation.parts import CARD, read_evaluation
from posttrain.evaluation.report.view import gain_texts, number
from posttrain.support.paths import is_file
from posttrain.weights.run_folders import is_run

if TYPE_CHECKING:
    from rich.table import Table

Key = tuple[str, int]
"""A sample's prompt, and the number of the image among those of the prompt."""
EXPECTED = (
    *("model.weights", "model.sha256", "model.settings.type", "model.settings.revision"),
    *("shown", "sampler.batch_size", "model.base"),
)
"""Entries of the result card that may differ between compared evaluations without a remark."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: its name in the table, its folder, its card, and its records by sample."""

    name: str
    folder: Path
    card: dict[str, Any]
    records: dict[Key, dict[str, Any]]

    def image(self, key: Key) -> Path | None:
        """The file of a sample's image; None if it was not kept."""
        if (kept := self.records[key].get("image")) is not None:
            return self.folder / kept
        in_grid = self.card.get("grid_prompts", [])
        if key[1] == 0 and key[0] in in_grid:
            return self.folder / "grid" / f"{in_grid.index(key[0]):03d}.png"
        return None


@dataclass(frozen=True)
class Comparison:
    """Evaluations, the samples that all of them have, and remarks on what makes them differ unfairly."""

    evaluations: list[Evaluated]
    keys: list[Key]
    remarks: list[str]

    @property
    def scores(self) -> list[str]:
        """The scores that every evaluation has, in the first one's order."""
        first, *others = self.evaluations
        return [s for s in first.card["scores"] if all(s in other.card["scores"] for other in others)]

    def heading(self, score: str) -> str:
        """The score's name, with "(lower is better)" if that is so."""
        higher = self.evaluations[0].card["scores"][score]["higher_is_better"]
        return score if higher else f"{score} (lower is better)"

    def mean(self, of: Evaluated, score: str) -> float:
        """The mean over the shared samples."""
        return fmean(self.values(of, score))

    def values(self, of: Evaluated, score: str) -> list[float]:
        """The scores of the shared samples, in the order of :attr:`keys`."""
        return [of.records[key]["scores"][score] for key in self.keys]

    def difference(self, of: Evaluated, score: str) -> tuple[float, float, float]:
        """The mean of ``of`` minus the first evaluation's, and its 95 % interval over prompts."""
        groups = [prompt for prompt, _ in self.keys]
        first = self.values(self.evaluations[0], score)
        return paired_difference(first, self.values(of, score), groups=groups)


def load(folders: Sequence[Path]) -> Comparison:
    """Read evaluations from their folders, or from the folders of the stages that they evaluate.

    Raises PosttrainError if a folder holds no finished evaluation, if there are fewer than two, or if they
    share no sample or no score.
    """
    if len(folders) < 2:
        raise PosttrainError("compare needs two evaluations or more")
    paths = [f / "evaluation" if is_file(f / "evaluation" / CARD) else f for f in folders]
    evaluations = [_read(path, name) for path, name in zip(paths, distinct_names(folders), strict=True)]
    first, *others = evaluations
    keys = [key for key in first.records if all(key in other.records for other in others)]
    if not keys:
        raise PosttrainError("the evaluations share no sample: other prompts, or other image numbers")
    remarks = [remark for other in others for remark in _remarks(first, other, len(keys))]
    comparison = Comparison(evaluations, keys, list(dict.fromkeys(remarks)))
    if not comparison.scores:
        raise PosttrainError("the evaluations share no score")
    return comparison


def _remarks(first: Evaluated, other: Evaluated, shared: int) -> Iterator[str]:
    """Say if fewer samples than measured are compared, and which settings differ."""
    if len(other.records) != shared or len(first.records) != shared:
        counts = f"{len(first.records)} in {first.name}, {len(other.records)} in {other.name}"
        yield f"compared on the {shared} samples that all have ({counts})"
    if others := other_base(first.card, other.card):
        yield f"{first.name} and {other.name} were made from two base models: {', '.join(others)} differ"
    lines = [line for line in differing(first.card, other.card) if not line.startswith(EXPECTED)]
    if lines:
        named = (s.replace("(was", f"({first.name}:").replace(", now", f", {other.name}:") for s in lines)
        yield f"{first.name} and {other.name} were not measured alike: {'; '.join(named)}"


def compare_table(comparison: Comparison) -> Table:
    """The terminal's table: means on the shared samples, and differences from the first evaluation."""
    from rich.table import Table
    from rich.text import Text

    title = f"{len(comparison.keys)} shared samples, against {comparison.evaluations[0].name}"
    table = Table(title=Text(title), title_justify="left", title_style="dim", box=None, pad_edge=False)
    for heading in ("score", "model"):
        table.add_column(heading, overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("difference [95 %]", no_wrap=True)
    for score in comparison.scores:
        for i, evaluated in enumerate(comparison.evaluations):
            change = Text(worded(comparison.difference(evaluated, score)) if i else "")
            if "not significant" in change.plain:
                change.stylize("dim")
            mean = number(comparison.mean(evaluated, score))
            table.add_row(Text("" if i else comparison.heading(score)), Text(evaluated.name), mean, change)
    return table


def worded(difference: tuple[float, float, float]) -> str:
    """A difference and its interval as ``+0.050 [+0.010, +0.090]``, with "not significant" if it is not."""
    change, low, high = gain_texts(*difference)
    text = f"{change} [{low}, {high}]" if math.isfinite(difference[2]) else f"{change} [of one sample]"
    return f"{text} not significant" if difference[1] <= 0 <= difference[2] else text


def _read(folder: Path, name: str) -> Evaluated:
    if not is_file(folder / CARD):
        hint = ": 'posttrain report' compares runs" if is_run(folder) else ""
        raise PosttrainError(f"{str(folder)!r} holds no finished evaluation (no {CARD}){hint}")
    card, records = read_evaluation(folder)
    return Evaluated(name, folder, card, {(r["prompt"], r["index"]): r for r in records})
