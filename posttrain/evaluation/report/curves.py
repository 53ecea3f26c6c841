"""How is a curve drawn into a page, without a script or a library?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

COLORS = ("#2f6fde", "#d9622b", "#2a9d62", "#a34fc4", "#b8901f", "#c2395f")
Series = Sequence[tuple[float, float]]


def chart(title: str, series: Mapping[str, Series], width: int = 520, height: int = 240) -> Markup:
    """An inline SVG: each series' points faint, and their running mean as a line. Empty without points."""
    kept = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return Markup("")
    xs = [x for points in kept.values() for x, _ in points]
    ys = sorted(y for points in kept.values() for _, y in points)
    # a single spike must not flatten the curve
    low, high = ys[int(0.005 * (len(ys) - 1))], ys[math.ceil(0.995 * (len(ys) - 1))]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(low, high)
    x0, x1 = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y0, y1 = min(low, y_ticks[0]), max(high, y_ticks[-1])
    left, right, top, bottom = 52, 12, 34, 28

    def at(x: float, y: float) -> str:
        px = left + (x - x0) / ((x1 - x0) or 1) * (width - left - right)
        py = height - bottom - (min(max(y, y0), y1) - y0) / ((y1 - y0) or 1) * (height - top - bottom)
        return f"{px:.1f},{py:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{left}" y="14">{escape(title)}</text>')
    for tick in y_ticks:
        x, y = at(x0, tick).split(",")
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in x_ticks:
        x = at(tick, y0).split(",")[0]
        parts.append(f'<text class="tick" x="{x}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    # a stage keeps its colour in every chart, also where others have no such series
    colors = dict(zip(series, itertools.cycle(COLORS), strict=False))
    legend = left
    for name, points in kept.items():
        color = colors[name]
        raw = " ".join(at(x, y) for x, y in points)
        mean = " ".join(at(x, y) for x, y in smoothed(points))
        parts.append(f'<polyline points="{raw}" fill="none" stroke="{color}" stroke-opacity="0.25"/>')
        parts.append(f'<polyline points="{mean}" fill="none" stroke="{color}" stroke-width="2"/>')
        if len(points) == 1:
            x, y = at(*points[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        parts.append(f'<rect x="{legend}" y="21" width="10" height="3" fill="{color}"/>')
        parts.append(f'<text class="tick" x="{legend + 14}" y="26">{escape(name)}</text>')
        legend += 32 + 7 * len(name)
    return Markup("".join(parts) + "</svg>")


def histogram(
    title: str, low: float, high: float, counts: Sequence[int], width: int = 520, height: int = 240
) -> Markup:
    """An inline SVG with a bar for each of ``counts``, over equal bins from ``low`` to ``high``."""
    left, right, top, bottom = 52, 12, 34, 28
    each, most = (width - left - right) / len(counts), max(*counts, 1)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="{left}" y="14">{escape(title)}</text>')
    for i, count in enumerate(counts):
        tall = count / most * (height - top - bottom)
        x, y = left + i * each, height - bottom - tall
        bar = f'<rect x="{x:.1f}" y="{y:.1f}" width="{each - 1:.1f}" height="{tall:.1f}" fill="{COLORS[0]}"/>'
        parts.append(bar)
    for x, value, anchor in ((left, low, "start"), (width - right, high, "end")):
        tick = f'<text class="tick" x="{x}" y="{height - 8}" text-anchor="{anchor}">{value:.3g}</text>'
        parts.append(tick)
    parts.append(f'<text class="tick" x="{left - 6}" y="{top + 4}" text-anchor="end">{most}</text>')
    return Markup("".join(parts) + "</svg>")


def smoothed(points: Series) -> list[tuple[float, float]]:
    """The running mean over about a tenth of the curve."""
    reach = max(1, len(points) // 20)
    means = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most ``low`` to about ``high``."""
    if high <= low:
        high = low + (abs(low) or 1)
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.floor(low / step) * step
    return [round(first + i * step, 12) for i in range(int((high - first) / step + 1.001))]
