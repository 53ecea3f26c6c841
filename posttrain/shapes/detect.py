"""Detects the shapes in an image by plain image analysis, without a network.

Each row's background is estimated. Each pixel is then explained as a blend of the background with one colour
of Shapes. Connected pixels are an object, or several that touch (:mod:`posttrain.shapes.outlines`). An
object's class is that of the outline that fits it best, and its colour the one that most of it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.shapes.outlines import components, pieces
from posttrain.shapes.render import RGB
from posttrain.shapes.scene import SIZE

Pixels = NDArray[np.float32]

PALETTE = np.array(list(RGB.values()), np.float32) / 255
NAMES = list(RGB)
LEAST_AREA = 16
"""Least pixels of an object in a 64 x 64 image; smaller specks are noise."""
TOLERANCE = 0.36
"""Largest RGB distance of a pixel from a blend of the background with a colour."""
FAINT = 0.2
"""Least part of a colour in a pixel of an object."""
SEEN = 0.4
"""Least part of its colour that the strongest tenth of an object has; fainter ones are nothing."""
MALFORMED, CLEAR = 0.62, 0.88
"""The fit to the best outline up to which the score is 0, and from which it is 1."""
THRESHOLD = 0.3
"""Least score of a detection, as in GenEval."""


def detect(image: Pixels) -> dict[str, list[dict[str, Any]]]:
    """The detections of each class in ``image`` (3, h, w), values in [0, 1], best first.

    A detection has ``box`` (x0, y0, x1, y1) in pixels, ``score`` in (0.3, 1] and ``color``.
    """
    pixels, times = _reduced(np.ascontiguousarray(np.moveaxis(image, 0, 2), np.float32))
    scale = pixels.shape[0] * pixels.shape[1] / 64**2
    shapes: dict[str, list[dict[str, Any]]] = {}
    coverage, color = _explained(pixels)
    for y, x in _objects(coverage, color):
        for piece in pieces(y, x, color[y, x], LEAST_AREA * scale):
            score = float(np.clip((piece.fit - MALFORMED) / (CLEAR - MALFORMED), 0, 1))
            if len(piece.y) >= LEAST_AREA * scale and score > THRESHOLD:
                x0, y0, x1, y1 = piece.x.min(), piece.y.min(), piece.x.max() + 1, piece.y.max() + 1
                name = NAMES[np.bincount(color[piece.y, piece.x]).argmax()]
                found = {"box": [float(times * v) for v in (x0, y0, x1, y1)], "score": score, "color": name}
                shapes.setdefault(piece.kind, []).append(found)
    for detections in shapes.values():
        detections.sort(key=lambda d: (-d["score"], d["box"]))
    return shapes


def _reduced(pixels: Pixels) -> tuple[Pixels, int]:
    """``pixels`` (h, w, 3) averaged over squares, so that the shorter side has 64 to 127, and their side."""
    side = max(1, min(pixels.shape[:2]) // SIZE)
    height, width = (n // side for n in pixels.shape[:2])
    whole = pixels[: height * side, : width * side]
    return whole.reshape(height, side, width, side, 3).mean((1, 3)), side


def _objects(
    coverage: Pixels, color: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The y and x of the connected pixels that have at least half as much colour as their strongest ones."""
    for y, x in components((color >= 0) & (coverage > FAINT)):
        strongest = np.quantile(coverage[y, x], 0.9)
        if strongest > SEEN:
            object_ = np.zeros(coverage.shape, bool)
            object_[y, x] = coverage[y, x] > strongest / 2
            yield from components(object_)


def _explained(pixels: Pixels) -> tuple[Pixels, NDArray[np.int64]]:
    """How much of each pixel is a palette colour, (h, w) in [0, 1], and the colour's index (-1 for none)."""
    # the background is light; a shape at one end of a row must not darken it
    border = np.concatenate([pixels[:, :3], pixels[:, -3:]], axis=1)
    background = np.quantile(border, 0.75, axis=1, keepdims=True)
    toward = PALETTE - background  # (h, 1, 3) against (4, 3) -> (h, 4, 3)
    away = pixels - background
    blend = np.einsum("hwc,hkc->hwk", away, toward) / np.square(toward).sum(-1)[:, None, :].clip(1e-6)
    blend = blend.clip(0, 1)
    residual = away[:, :, None, :] - blend[..., None] * toward[:, None, :, :]
    distance = np.sqrt(np.square(residual).sum(-1))
    best = distance.argmin(-1)
    near = np.take_along_axis(distance, best[..., None], -1)[..., 0] < TOLERANCE
    return np.take_along_axis(blend, best[..., None], -1)[..., 0], np.where(near, best, -1)
