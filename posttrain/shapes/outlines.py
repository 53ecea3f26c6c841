"""Fits circles, squares and triangles to the pixels of an object, and parts objects that touch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from posttrain.shapes.scene import SHAPES

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]
Offset = NDArray[np.float64]

TILTS = (-0.2, 0.0, 0.2)
"""Angles in radians at which outlines are tried: about 11 degrees either way."""
STRETCH = 0.8
"""Least ratio of an object's height and width, or the other way round, that takes nothing off its fit."""
BETTER = 0.05
"""By how much the parts of an object must fit better than the whole to be objects of their own."""
SHAPE = 0.75
"""Least fit of a part that was cut off at a narrow place."""
MOST = 12
"""Most parts of an object, specks included. What has more is no group of shapes, and slow to part."""


class Piece(NamedTuple):
    """One object: its pixels' y and x, its class, and how well it fits the class's outline, in [0, 1]."""

    y: Index
    x: Index
    kind: str
    fit: float


def classified(y: Index, x: Index) -> tuple[str, float]:
    """The class of an object, given as the y and x of its pixels, and its fit in [0, 1].

    The fit is the overlap (intersection over union) with the outline that has the object's centre, area and
    stretch, upright or tilted a little. So a few pixels that stick out, or lack at a corner, matter as little
    as they are. An object that is stretched by more than 5 : 4 fits less.
    """
    dy, dx = y - y.mean(), x - x.mean()
    # all outlines spread equally far along both axes; a pixel's own spread keeps a line's from being 0
    ratio = math.sqrt((np.square(dx).mean() + 1 / 12) / (np.square(dy).mean() + 1 / 12))
    dy, dx = dy * math.sqrt(ratio), dx / math.sqrt(ratio)
    overlaps = {kind: max(_overlap(kind, *_turned(dy, dx, angle)) for angle in TILTS) for kind in SHAPES}
    best = max(overlaps, key=lambda kind: overlaps[kind])
    return best, overlaps[best] * min(1.0, min(ratio, 1 / ratio) / STRETCH)


def _turned(dy: Offset, dx: Offset, angle: float) -> tuple[Offset, Offset]:
    """The offsets ``dy`` and ``dx`` turned by ``angle``, in radians."""
    sin, cos = math.sin(angle), math.cos(angle)
    return cos * dy - sin * dx, sin * dy + cos * dx


def _overlap(kind: str, dy: Offset, dx: Offset) -> float:
    """The overlap of pixels, at offsets from their centre, with an outline of their area."""
    area = len(dy)
    if kind == "circle":
        inside = dy**2 + dx**2 <= area / math.pi
    elif kind == "square":
        inside = np.maximum(np.abs(dy), np.abs(dx)) <= math.sqrt(area) / 2
    else:
        height = math.sqrt(area * math.sqrt(3))
        down = dy + height * 2 / 3  # from the top; the centre is at two thirds of the height
        inside = (np.abs(dx) <= down / math.sqrt(3)) & (down <= height)
    both = int(inside.sum())
    return both / (2 * area - both)


def pieces(y: Index, x: Index, color: Index, least: float) -> list[Piece]:
    """The objects that connected pixels are: one, or several that touch.

    The pixels are given as y, x and ``color``, each (n,). They are parted by colour or at narrow places if
    the parts fit outlines better than the whole. Parts of fewer than ``least`` pixels are nothing.
    """
    whole = Piece(y, x, *classified(y, x))
    best, reached = [whole], whole.fit + BETTER
    if whole.fit > 1 - BETTER:
        return best
    by_color = [part for k in np.unique(color) for part in _connected(y, x, color == k)]
    for parts in (by_color, _cut(y, x, least)):
        if not 2 <= len(parts) <= MOST:
            continue
        found = [p for i in parts if len(i) >= least for p in pieces(y[i], x[i], color[i], least)]
        fit = sum(p.fit * len(p.y) for p in found) / len(y)
        if fit > reached and (parts is by_color or min(p.fit for p in found) > SHAPE):
            best, reached = found, fit
    return best


def components(mask: Mask) -> list[tuple[Index, Index]]:
    """The 4-connected components of ``mask`` (h, w), each as the y and the x of its pixels."""
    width = mask.shape[1]
    left = set(np.flatnonzero(mask).tolist())
    groups = []
    while left:
        seed = left.pop()
        stack, member = [seed], [seed]
        while stack:
            at = stack.pop()
            column = at % width
            for near in (
                at - width,
                at + width,
                at - 1 if column else -1,
                at + 1 if column < width - 1 else -1,
            ):
                if near in left:
                    left.remove(near)
                    stack.append(near)
                    member.append(near)
        index = np.array(member)
        groups.append((index // width, index % width))
    return groups


def _connected(y: Index, x: Index, chosen: Mask) -> Iterator[Index]:
    """The positions in y and x of each component of the ``chosen`` pixels."""
    number = np.full((y.max() + 1, x.max() + 1), -1)
    number[y[chosen], x[chosen]] = np.flatnonzero(chosen)
    for part in components(number >= 0):
        yield number[part]


def _cut(y: Index, x: Index, least: float) -> list[Index]:
    """The positions in y and x of the parts that are left when the object is cut at its narrowest places.

    Pixels are taken off the border until it falls apart, and then go to the nearest part.
    """
    mask = np.zeros((y.max() + 2, x.max() + 2), bool)
    mask[y, x] = True
    while mask.any():
        mask &= np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1)
        cores = [core for core in components(mask) if len(core[0]) >= least / 4]
        if len(cores) > 1:
            away = [(np.square(y[:, None] - v) + np.square(x[:, None] - u)).min(1) for v, u in cores]
            nearest = np.argmin(away, axis=0)
            return [np.flatnonzero(nearest == k) for k in range(len(cores))]
    return []
