"""Chooses the ticks of a chart's axes and their labels, and where points lie between them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Series = Sequence[tuple[float, float]]
"""Points (x, y), in the order of x."""
LEFT, RIGHT, BOTTOM = 46, 18, 26
"""The margins beside and below the plotted area, in pixels; the left one grows with the labels."""
LETTER = 6.8
"""Pixels that a letter of a label takes, at most on average."""
FLAT = 1e-6
"""A curve whose values differ by less than this part of the largest is drawn as a flat one."""


@dataclass(frozen=True)
class Axes:
    """The ticks of both axes, the ranges that they span, and the place of the plotted area in pixels."""

    x_ticks: list[float]
    y_ticks: list[float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int
    height: int
    top: int

    @classmethod
    def around(cls, points: Series, width: int, height: int, top: int) -> Axes:
        """Axes for ``points``; the largest and smallest 0.5 % of the values may lie outside."""
        xs, ys = [x for x, _ in points], sorted(y for _, y in points)
        # a single spike must not flatten the curve
        low, high = ys[int(0.005 * (len(ys) - 1))], ys[math.ceil(0.995 * (len(ys) - 1))]
        x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(low, high)
        x_range = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
        y_range = min(low, y_ticks[0]), max(high, y_ticks[-1])
        return cls(x_ticks, y_ticks, x_range, y_range, width, height, top)

    @functools.cached_property
    def left(self) -> int:
        """The left edge of the plotted area."""
        return max(LEFT, round(12 + LETTER * max(map(len, labels(self.y_ticks)))))

    def at(self, x: float, y: float) -> str:
        """The pixel position of a point, "x,y"; values outside the range are drawn at its edge."""
        px = self.left + _part(x, self.x_range) * (self.width - self.left - RIGHT)
        py = self.height - BOTTOM - _part(y, self.y_range) * (self.height - self.top - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    def svg(self) -> Iterator[str]:
        """The grid lines and the numbers of the ticks."""
        for tick, label in zip(self.y_ticks, labels(self.y_ticks), strict=True):
            _, y = self.at(self.x_range[0], tick).split(",")
            yield f'<line class="grid" x1="{self.left}" x2="{self.width - RIGHT}" y1="{y}" y2="{y}"/>'
            place = f'x="{self.left - 6}" y="{float(y) + 4:.1f}" text-anchor="end"'
            yield f'<text class="tick" {place}>{label}</text>'
        for tick, label in zip(self.x_ticks, labels(self.x_ticks), strict=True):
            x = self.at(tick, self.y_range[0]).split(",")[0]
            yield f'<text class="tick" x="{x}" y="{self.height - 8}" text-anchor="middle">{label}</text>'


def _part(value: float, span: tuple[float, float]) -> float:
    """Where ``value`` lies in ``span``, from 0 at its low end to 1 at its high end."""
    low, high = span
    value = min(max(value, low), high)
    # halves, since the width of a span may exceed the largest float
    return (value / 2 - low / 2) / ((high / 2 - low / 2) or 1)


def ticks(low: float, high: float, count: int = 4, *, whole: bool = False) -> list[float]:
    """About ``count`` round numbers at equal distances, from at most ``low`` to about ``high``.

    They differ from each other, also where ``low`` and ``high`` hardly do. ``whole`` asks for whole numbers.
    """
    low, high = (max(-1e300, min(value, 1e300)) for value in (low, high))
    if high - low <= FLAT * max(abs(low), abs(high)):
        high = low + (abs(low) or 1)
    least = max((high - low) / count, 1 if whole else 1e-290)
    power = math.floor(math.log10(least))
    sizes = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(s * 10.0**power for s in sizes if s * 10.0**power >= least * 0.999)
    first = math.floor(low / step)
    last = math.floor(high / step + 0.001)
    digits = 2 - power
    return [round(i * step, digits) for i in range(first, max(last, first + 1) + 1)]


def labels(marks: Sequence[float]) -> list[str]:
    """The texts of ticks: no more digits than tell them apart, and an exponent for tiny or huge ones."""
    largest = max(map(abs, marks)) or 1
    power = 0 if 1e-3 <= largest < 1e5 else math.floor(math.log10(largest))
    scaled = [mark / 10.0**power for mark in marks]
    step = min((abs(b - a) for a, b in itertools.pairwise(scaled)), default=1)
    near = (
        digits
        for digits in range(17)
        if all(abs(round(value, digits) - value) <= 0.01 * step for value in scaled)
    )
    digits = next(near, 17)
    end = f"e{power}" if power else ""
    return [f"{value:.{digits}f}{end}" if value else "0" for value in scaled]
