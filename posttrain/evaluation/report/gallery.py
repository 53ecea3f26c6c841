"""Chooses the images of a page and their order: the prompts that gained and lost most come first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from posttrain.errors import DamagedError
from posttrain.evaluation.report.pictures import data_url, stored_side
from posttrain.evaluation.report.results import Sample, StageResult
from posttrain.evaluation.report.view import Cell, Gallery, Picture, Row, Shown, Table, number

MOST_SAMPLES = 36
"""So many samples have their images on the page, at most."""
MOST_FIRST = 6
"""So many of those that gained most, and of those that lost most, come first."""
MOST_CHANGED = 10
"""So many prompts are listed that gained most, and that lost most."""
MOST_GRIDS = 5
"""So many grids of each stage are on the page, at most."""
GRID_PIXELS = 1280
"""No side of a stored grid has more pixels."""


@dataclass(frozen=True)
class Column:
    """One evaluated model: its name, the scores of its samples, and the images that were kept of them."""

    name: str
    scores: Mapping[Sample, Mapping[str, float]]
    images: Mapping[Sample, Path]
    key: int = 0
    """Number of its colour."""


@dataclass(frozen=True)
class Versus:
    """The two columns between which samples gain and lose, and the score that tells."""

    before: int
    after: int
    score: str
    higher_is_better: bool = True

    def changes(self, columns: Sequence[Column]) -> dict[Sample, float]:
        """The change of each sample's score that both columns have."""
        one, other = columns[self.before].scores, columns[self.after].scores
        return {
            sample: other[sample][self.score] - scores[self.score]
            for sample, scores in one.items()
            if self.score in scores and self.score in other.get(sample, {})
        }

    def gain(self, change: float) -> float:
        """The change, with a sign by which more is better."""
        return change if self.higher_is_better else -change


def gallery(
    columns: Sequence[Column], versus: Versus | None, most: int = MOST_SAMPLES, *, alike: bool = True
) -> Gallery | None:
    """The images of up to ``most`` samples, those that changed most first. None where there is no image.

    ``alike`` says that all columns were sampled from the same noise.
    """
    columns_of = Counter(sample for column in columns for sample in column.images)
    if not columns_of or not most:
        return None
    changes = versus.changes(columns) if versus else {}
    gains = {s: versus.gain(changes[s]) for s in columns_of if s in changes} if versus else {}
    ordered = sorted(columns_of, key=lambda s: (-columns_of[s], -abs(gains.get(s, 0))))[:most]
    up = sorted((s for s in ordered if gains.get(s, 0) > 0), key=lambda s: -gains[s])[:MOST_FIRST]
    down = sorted((s for s in ordered if gains.get(s, 0) < 0), key=lambda s: gains[s])[:MOST_FIRST]
    rest = [s for s in ordered if s not in {*up, *down}]
    side = stored_side(sum(columns_of[s] for s in ordered))
    groups = [("Gained most", up, True), ("Lost most", down, True), ("Other prompts", rest, not (up or down))]
    shown = [
        (title, [_shown(s, columns, changes.get(s), side) for s in samples], is_open)
        for title, samples, is_open in groups
        if samples
    ]
    kept = [column.name for column in columns]
    notes = ["Below each image are its scores. Click an image to enlarge it; arrow keys then go to the next."]
    if versus and (up or down):
        after, before = columns[versus.after].name, columns[versus.before].name
        notes.insert(0, f"Gained and lost: {versus.score} of {after} against {before}.")
    if len(columns_of) > len(ordered):
        notes.append(f"{len(ordered)} of the {len(columns_of)} samples with images are shown.")
    return Gallery("Same prompt, same noise" if alike else "Same prompt", kept, shown, " ".join(notes))


def _shown(sample: Sample, columns: Sequence[Column], change: float | None, side: int) -> Shown:
    prompt, index = sample
    title = f"{prompt} (image {index})" if index else prompt
    pictures = []
    for i, column in enumerate(columns):
        address, alt, tiny = _picture(column.images.get(sample), f"{column.name}: {title}", side)
        scores = column.scores.get(sample, {}).items()
        told = [(name, number(value)) for name, value in scores if "/" not in name]
        shape = "tiny" if tiny else ""
        pictures.append(Picture(i, column.name, address, alt, shape, told, column.key))
    return Shown(title, pictures, "" if change is None else number(change, "+"))


def _picture(file: Path | None, alt: str, side: int) -> tuple[str | None, str, bool]:
    """The data URL of an image, its alternative text, and whether it is tiny; no URL where there is none."""
    if file is None:
        return None, "no image", False
    try:
        address, tiny = data_url(file, side)
    except DamagedError as error:  # one bad file does not take the report of a long run
        return None, str(error), False
    return address, alt, tiny


def changed_prompts(columns: Sequence[Column], versus: Versus) -> Table | None:
    """The prompts that gained and lost most, each with its mean score before and after.

    None where nothing changed.
    """
    changes: dict[str, list[Sample]] = {}
    for sample in versus.changes(columns):
        changes.setdefault(sample[0], []).append(sample)
    before, after = (
        {p: fmean(columns[i].scores[s][versus.score] for s in samples) for p, samples in changes.items()}
        for i in (versus.before, versus.after)
    )
    ordered = sorted(changes, key=lambda p: -versus.gain(after[p] - before[p]))
    up = [p for p in ordered if versus.gain(after[p] - before[p]) > 0][:MOST_CHANGED]
    down = [p for p in reversed(ordered) if versus.gain(after[p] - before[p]) < 0][:MOST_CHANGED]
    rows = [
        Row(p, [Cell(number(before[p])), Cell(number(after[p])), Cell(number(after[p] - before[p], "+"))])
        for p in (*up, *down)
    ]
    names = [columns[versus.before].name, columns[versus.after].name, "change"]
    title = f"The prompts of all {len(changes)} whose {versus.score} gained and lost most"
    return Table(title, "prompt", names, rows) if rows else None


def grids(stage: StageResult) -> Gallery | None:
    """The grids that a stage drew while it trained: the first, the last, and some between."""
    steps = sorted(stage.grids)
    if not steps:
        return None
    count = min(len(steps), MOST_GRIDS)
    picked = sorted({steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)})
    pictures = []
    for i, step in enumerate(picked):
        told = f"Images of {stage.name} after step {step}, each above its prompt"
        address, alt, _ = _picture(stage.grids[step], told, GRID_PIXELS)
        pictures.append(Picture(i, f"step {step}", address, alt, "sheet"))
    note = "" if len(picked) == len(steps) else f"{len(picked)} of {len(steps)} grids are shown."
    names = [picture.name for picture in pictures]
    return Gallery(stage.name, names, [("", [Shown("", pictures)], True)], note, len(names) - 1)
