"""Draws curves, histograms and intervals as inline SVG, without a script or a plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup, escape

from posttrain.evaluation.report.axes import BOTTOM, LEFT, LETTER, RIGHT, Axes, Series, labels

COLORS = ("#2f6fde", "#d9622b", "#2a9d62", "#a34fc4", "#a67c00", "#c2395f")
DASHES = ("", "7 3", "2 3")
"""The patterns of lines: after the last colour the first one comes again, with the next pattern."""
MOST_POINTS = 240
"""A curve is drawn with about so many points, however many were recorded."""


def chart(title: str, series: Mapping[str, Series], width: int = 420, height: int = 220) -> Markup:
    """An SVG of curves by name: the points as a faint line, and their running mean as a strong one.

    ``width`` and ``height`` are in pixels; a legend of several lines makes it higher. Points that are not
    finite are left out. Without points the result is empty.
    """
    kept = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return Markup("")
    # a stage has the same colour in every chart, even if other stages lack the metric
    numbers = {name: i for i, name in enumerate(series)}
    legend, rows = _legend({name: numbers[name] for name in kept}, width)
    top, height = 22 + 16 * rows, height + 16 * (rows - 1)
    axes = Axes.around([p for points in kept.values() for p in points], width, height, top)
    parts = [*_opening(title, width, height, _summary(kept)), *legend, *axes.svg()]
    for name, points in kept.items():
        parts += _curve(axes, points, numbers[name])
    return Markup("".join(parts) + "</svg>")


def line_style(number: int) -> str:
    """The attributes of the line with this number: its colour, and a pattern where the colours come again."""
    dash = DASHES[number // len(COLORS) % len(DASHES)]
    return f'stroke="{COLORS[number % len(COLORS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _summary(series: Mapping[str, Series]) -> str:
    """The curves in words, for those who do not see them."""
    ends = ((name, *points[0], *points[-1]) for name, points in series.items())
    return "; ".join(
        f"{name} from {y0:.4g} at step {x0} to {y1:.4g} at step {x1}" for name, x0, y0, x1, y1 in ends
    )


def _opening(title: str, width: int, height: int, summary: str) -> Iterator[str]:
    label = escape(f"{title}: {summary}")
    yield f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    yield f'<text class="title" x="4" y="14">{escape(title)}</text>'


def _legend(numbers: Mapping[str, int], width: int) -> tuple[list[str], int]:
    """The names with their lines, in as many rows as they need, and the number of the rows."""
    parts, x, row = list[str](), LEFT, 1
    most = int((width - LEFT - RIGHT - 24) / LETTER)
    for name, number in numbers.items():
        shown = name if len(name) <= most else f"{name[: most - 1]}…"
        size = 24 + LETTER * len(shown)
        if x > LEFT and x + size > width - RIGHT:
            x, row = LEFT, row + 1
        y = 14 + 16 * row
        ends = f'x1="{x:.0f}" x2="{x + 16:.0f}" y1="{y - 4}" y2="{y - 4}"'
        parts.append(f'<line {ends} stroke-width="3" {line_style(number)}/>')
        parts.append(
            f'<text class="tick" x="{x + 20:.0f}" y="{y}">{escape(shown)}<title>{escape(name)}</title></text>'
        )
        x += size + 12
    return parts, row


def _curve(axes: Axes, points: Series, number: int) -> Iterator[str]:
    style = line_style(number)
    raw = " ".join(axes.at(x, y) for x, y in thinned(points))
    mean = " ".join(axes.at(x, y) for x, y in smoothed(points))
    yield f'<polyline points="{raw}" fill="none" stroke-opacity="0.28" {style}/>'
    yield f'<polyline points="{mean}" fill="none" stroke-width="2" stroke-linejoin="round" {style}/>'
    if len(points) == 1:  # a line of one point is invisible
        x, y = axes.at(*points[0]).split(",")
        yield f'<circle cx="{x}" cy="{y}" r="3" fill="{COLORS[number % len(COLORS)]}"/>'


def histogram(title: str, low: float, high: float, counts: Sequence[int], color: int = 0) -> Markup:
    """An SVG with a bar for each of ``counts``, over equal bins from ``low`` to ``high``."""
    width, height, top = 420, 220, 34
    bin_width, most = (width - LEFT - RIGHT) / len(counts), max(*counts, 1)
    summary = (
        f"{sum(counts)} values from {low:.3g} to {high:.3g}, at most {most} in one of {len(counts)} bins"
    )
    parts = list(_opening(title, width, height, summary))
    for i, count in enumerate(counts):
        tall = count / most * (height - top - BOTTOM)
        corner = f'x="{LEFT + i * bin_width:.1f}" y="{height - BOTTOM - tall:.1f}"'
        size = f'width="{bin_width - 1:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect {corner} {size} fill="{COLORS[color % len(COLORS)]}"/>')
    for x, value, anchor in zip((LEFT, width - RIGHT), labels([low, high]), ("start", "end"), strict=True):
        parts.append(f'<text class="tick" x="{x}" y="{height - 8}" text-anchor="{anchor}">{value}</text>')
    parts.append(f'<text class="tick" x="{LEFT - 6}" y="{top + 4}" text-anchor="end">{most}</text>')
    return Markup("".join(parts) + "</svg>")


def interval(change: float, low: float, high: float, span: tuple[float, float], kind: str) -> Markup:
    """A small SVG of a difference and its interval within ``span``, beside a line at 0.

    The words beside it say the same, so those who do not see it miss nothing. ``kind`` is its class.
    """
    width, height, edge = 112, 12, 4
    left, right = min(span[0], 0), max(span[1], 0)
    scale = (width - 2 * edge) / ((right - left) or 1)
    zero, a, b, middle = (edge + (value - left) * scale for value in (0, low, high, change))
    return Markup(
        f'<svg class="interval {kind}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{height}"/>'
        f'<line x1="{a:.1f}" x2="{b:.1f}" y1="6" y2="6" stroke-width="3"/>'
        f'<circle cx="{middle:.1f}" cy="6" r="3.5"/></svg>'
    )


def thinned(points: Series) -> Series:
    """``points``, or the lowest and the highest of each of many equal parts where there are very many."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-2 * len(points) // MOST_POINTS)
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [p for part in parts for p in sorted({min(part, key=_y), max(part, key=_y)})]


def smoothed(points: Series) -> list[tuple[float, float]]:
    """The running mean of ``points`` over about a tenth of the curve, at up to ``MOST_POINTS`` of them."""
    reach = max(1, len(points) // 20)
    picked = sorted({*range(0, len(points), -(-len(points) // MOST_POINTS) or 1), len(points) - 1})
    means = []
    for i in picked:
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        means.append((points[i][0], math.fsum(near) / len(near)))
    return means


def _y(point: tuple[float, float]) -> float:
    return point[1]
