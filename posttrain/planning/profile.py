"""Says how many bytes a counted computation holds at a time, for any number of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class Segment:
    """A part of a computation that happens ``copies`` times in a row. Bytes are pairs: fixed, and of each
    row."""

    def __init__(self, copies: int, *, of_all: bool = False) -> None:
        self.copies, self.of_all = copies, of_all
        self.fixed = self.each = 0
        """Bytes held at its end minus those at its start."""
        self.highs = [(0, 0)]
        """The bytes held, minus those at its start, after each storage that was made."""

    def add(self, fixed: int, each: int) -> None:
        """Storage that was made, or freed if negative."""
        self.fixed, self.each = self.fixed + fixed, self.each + each
        if fixed > 0 or each > 0:
            self.highs.append((self.fixed, self.each))

    def peak(self, rows: int) -> int:
        """The most bytes held at a time, minus those at its start."""
        return max(fixed + each * rows for fixed, each in self.highs)


class Profile:
    """The bytes that a computation holds, segment after segment."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._segments = list(segments)

    def peak(self, rows: int = 1) -> int:
        """The most bytes held at a time, if the computation had ``rows`` rows."""
        held = most = 0
        for segment in self._segments:
            change, peak = segment.fixed + segment.each * rows, segment.peak(rows)
            repeats = (segment.copies - 1) * change
            most = max(most, held + peak, held + repeats + peak)
            held += change + repeats
        return most

    def as_json(self) -> list[Any]:
        """The profile as JSON values: of each segment its copies, its two changes and its highest points."""
        return [[s.copies, s.fixed, s.each, _highest(s.highs)] for s in self._segments]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Profile:
        """The inverse of :meth:`as_json`. Raises ValueError or TypeError for other values."""
        segments = []
        for copies, fixed, each, highs in values:
            segment = Segment(int(copies))
            segment.fixed, segment.each = int(fixed), int(each)
            segment.highs = [(int(one), int(other)) for one, other in highs]
            segments.append(segment)
        return cls(segments)


def _highest(points: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The points that are highest for some number of rows: no other is as large in both numbers."""
    kept: list[tuple[int, int]] = []
    for fixed, each in sorted(set(points), key=lambda point: (-point[1], -point[0])):
        if not kept or fixed > kept[-1][0]:
            kept.append((fixed, each))
    return kept
