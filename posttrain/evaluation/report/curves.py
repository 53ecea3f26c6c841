"""Draws curves and histograms as inline SVG, without a script or a plotting library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLORS = ("#2f6fde", "#d9622b", "#2a9d62", "#a34fc4", "#b8901f", "#c2395f")
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 34, 28
"""The margins around the plotted area, in pixels."""
Series = Sequence[tuple[float, float]]
"""Points (x, y), in the order of x."""


def chart(title: str, series: Mapping[str, Series], width: int = 520, height: int = 240) -> Markup:
    """An SVG of curves by name: the points as a faint line, and their running mean as a strong one.

    ``width`` and ``height`` are in pixels. Points that are not finite are left out. Without points the result
    is empty.
    """
    kept = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return Markup("")
    axes = _Axes.around([p for points in kept.values() for p in points], width, height)
    parts = [*_opening(title, width, height), *axes.svg()]
    # a stage has the same colour in every chart, even if other stages lack the metric
    colors = dict(zip(series, itertools.cycle(COLORS), strict=False))
    legend_x = LEFT
    for name, points in kept.items():
        parts += _curve(axes, points, colors[name])
        parts.append(f'<rect x="{legend_x}" y="21" width="10" height="3" fill="{colors[name]}"/>')
        parts.append(f'<text class="tick" x="{legend_x + 14}" y="26">{escape(name)}</text>')
        legend_x += 32 + 7 * len(name)
    return Markup("".join(parts) + "</svg>")


@dataclass(frozen=True)
class _Axes:
    """The ticks of both axes, the ranges that they span, and the size of the chart in pixels."""

    x_ticks: list[float]
    y_ticks: list[float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int
    height: int

    @classmethod
    def around(cls, points: Series, width: int, height: int) -> _Axes:
        """Axes for ``points``; the largest and smallest 0.5 % of the values may lie outside."""
        xs, ys = [x for x, _ in points], sorted(y for _, y in points)
        # a single spike must not flatten the curve
        low, high = ys[int(0.005 * (len(ys) - 1))], ys[math.ceil(0.995 * (len(ys) - 1))]
        x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(low, high)
        x_range = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
        y_range = min(low, y_ticks[0]), max(high, y_ticks[-1])
        return cls(x_ticks, y_ticks, x_range, y_range, width, height)

    def at(self, x: float, y: float) -> str:
        """The pixel position of a point, "x,y"; values outside the range are drawn at its edge."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        px = LEFT + (x - x0) / ((x1 - x0) or 1) * (self.width - LEFT - RIGHT)
        inner = self.height - TOP - BOTTOM
        py = self.height - BOTTOM - (min(max(y, y0), y1) - y0) / ((y1 - y0) or 1) * inner
        return f"{px:.1f},{py:.1f}"

    def svg(self) -> Iterator[str]:
        """The grid lines and the numbers of the ticks."""
        for tick in self.y_ticks:
            _, y = self.at(self.x_range[0], tick).split(",")
            yield f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y}" y2="{y}"/>'
            label_y = float(y) + 4
            yield f'<text class="tick" x="{LEFT - 6}" y="{label_y:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in self.x_ticks:
            x = self.at(tick, self.y_range[0]).split(",")[0]
            yield f'<text class="tick" x="{x}" y="{self.height - 8}" text-anchor="middle">{tick:g}</text>'


def _opening(title: str, width: int, height: int) -> Iterator[str]:
    yield f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    yield f'<text class="title" x="{LEFT}" y="14">{escape(title)}</text>'


def _curve(axes: _Axes, points: Series, color: str) -> Iterator[str]:
    raw = " ".join(axes.at(x, y) for x, y in points)
    mean = " ".join(axes.at(x, y) for x, y in smoothed(points))
    yield f'<polyline points="{raw}" fill="none" stroke="{color}" stroke-opacity="0.25"/>'
    yield f'<polyline points="{mean}" fill="none" stroke="{color}" stroke-width="2"/>'
    if len(points) == 1:  # a line of one point is invisible
        x, y = axes.at(*points[0]).split(",")
        yield f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>'


def histogram(
    title: str, low: float, high: float, counts: Sequence[int], width: int = 520, height: int = 240
) -> Markup:
    """An SVG with a bar for each of ``counts``, over equal bins from ``low`` to ``high``."""
    bin_width, most = (width - LEFT - RIGHT) / len(counts), max(*counts, 1)
    parts = list(_opening(title, width, height))
    for i, count in enumerate(counts):
        tall = count / most * (height - TOP - BOTTOM)
        corner = f'x="{LEFT + i * bin_width:.1f}" y="{height - BOTTOM - tall:.1f}"'
        size = f'width="{bin_width - 1:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect {corner} {size} fill="{COLORS[0]}"/>')
    for x, value, anchor in ((LEFT, low, "start"), (width - RIGHT, high, "end")):
        tick = f'<text class="tick" x="{x}" y="{height - 8}" text-anchor="{anchor}">{value:.3g}</text>'
        parts.append(tick)
    parts.append(f'<text class="tick" x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{most}</text>')
    return Markup("".join(parts) + "</svg>")


def smoothed(points: Series) -> list[tuple[float, float]]:
    """The running mean of ``points`` over about a tenth of the curve."""
    reach = max(1, len(points) // 20)
    means = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers at equal distances, from at most ``low`` to about ``high``."""
    if high <= low:
        high = low + (abs(low) or 1)
    least = (high - low) / count
    power = 10 ** math.floor(math.log10(least))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= least * 0.999)
    first = math.floor(low / step) * step
    return [round(first + i * step, 12) for i in range(int((high - first) / step + 1.001))]
