"""What a page shows, in the words and numbers that it shows: tables, images, curves, notes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

MOST_COLUMNS = 4
"""A table with more columns is cut into several, so that no column leaves the page."""


def number(value: float | None, sign: str = "") -> str:
    """A score with three digits behind the point, or two digits of a tiny one; a dash for what is no number.

    ``sign`` is "+" for a difference.
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{sign}.2g}" if 0 < abs(value) < 0.001 else f"{value:{sign}.3f}"


def interval_texts(score: Mapping[str, Any], *, short: bool = False) -> tuple[str, str] | None:
    """The ends of the interval of a card's ``score``. None where it has none, as of one sample: that does not
    tell how far others lie apart.

    ``short`` leaves two digits of a wide interval; the ends of a narrow one would be equal.
    """
    if "low" not in score or score.get("count") == 1:
        return None
    low, high = score["low"], score["high"]
    return (f"{low:.2f}", f"{high:.2f}") if short and high - low >= 0.05 else (number(low), number(high))


def gain_texts(change: float, low: float, high: float) -> tuple[str, str, str]:
    """A difference and the ends of its interval, with so many digits that the ends differ in two of them, or
    that the difference has two where they do not."""
    size = high - low if 0 < high - low < math.inf else abs(change)
    digits = min(max(3, math.ceil(1 - math.log10(size))), 9) if size else 3
    return f"{change:+.{digits}f}", f"{low:+.{digits}f}", f"{high:+.{digits}f}"


@dataclass(frozen=True)
class Cell:
    """One cell of a table. An empty one is a dash."""

    value: str = "–"
    notes: Sequence[str] = ()
    """Smaller lines below the value."""
    change: str = ""
    """The difference from the first row, in words."""
    kind: str = ""
    """``better`` or ``worse`` where the difference is significant, else ``same``; empty without one."""
    best: bool = False
    drawing: Markup | None = None


@dataclass(frozen=True)
class Row:
    """One row of a table: its name, what it is, and a cell for each column."""

    name: str
    cells: Sequence[Cell]
    note: str = ""
    key: int | None = None
    """Number of the colour beside the name, which curves use too."""
    total: bool = False


@dataclass(frozen=True)
class Table:
    """A table: what its rows are, the headings of the other columns, and the rows."""

    title: str
    corner: str
    columns: Sequence[str]
    rows: Sequence[Row]

    @property
    def parts(self) -> Iterator[Table]:
        """Tables of at most ``MOST_COLUMNS`` columns and of about equal width, with the same rows."""
        count = -(-len(self.columns) // MOST_COLUMNS)
        cuts = [round(i * len(self.columns) / count) for i in range(count + 1)] if count else []
        for i, start in enumerate(cuts[:-1]):
            part = slice(start, cuts[i + 1])
            rows = [Row(r.name, r.cells[part], r.note, r.key, r.total) for r in self.rows]
            yield Table(self.title, self.corner, self.columns[part], rows)


@dataclass(frozen=True)
class Picture:
    """An image: the number and name of what it is of, its address, and the scores beside it."""

    column: int
    name: str
    address: str | None
    """A data URL; None where there is no image."""
    alt: str
    """What it shows; where there is no image, why."""
    shape: str = ""
    """``tiny`` for an image that the page enlarges without smoothing, ``sheet`` for one of many images."""
    scores: Sequence[tuple[str, str]] = ()
    key: int | None = None
    """Number of the colour beside the name."""


@dataclass(frozen=True)
class Shown:
    """Images of one prompt and one noise, to be seen side by side or one in place of the other."""

    title: str
    pictures: Sequence[Picture]
    change: str = ""


@dataclass(frozen=True)
class Gallery:
    """Groups of images: heading, images, and whether they are seen without unfolding."""

    title: str
    names: Sequence[str]
    """What one chooses from to see the images of one alone."""
    groups: Sequence[tuple[str, Sequence[Shown], bool]]
    note: str = ""
    start: int | None = None
    """Number of the name that is seen at first; None for all side by side."""


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    lead: str
    remarks: Sequence[str] = ()
    meanings: Sequence[tuple[str, str]] = ()
    """Name of a score, and what it means."""
    scores: Table | None = None
    details: Table | None = None
    """Scores that few need."""
    scores_note: str = ""
    images: Gallery | None = None
    grids: Sequence[Gallery] = ()
    changed: Table | None = None
    """The prompts that gained and lost most."""
    tags: Table | None = None
    curves: Sequence[Markup] = ()
    more_curves: Sequence[Markup] = ()
    cost: Table | None = None
    cost_note: str = ""
    alarms: Sequence[str] = ()
    skipped: Sequence[str] = ()
    settings: Sequence[tuple[str, Sequence[str], str]] = ()
    """Heading, lines, and the text of a recipe."""
