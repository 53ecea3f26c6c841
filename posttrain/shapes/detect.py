"""Detects the shapes in an image by plain image analysis, without a network.

Each row's background is estimated. Each pixel is then explained as a blend of the background with one colour
of Shapes. Connected pixels of one colour are an object. Its class is the one whose outline overlaps it most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.shapes.render import RGB
from posttrain.shapes.scene import SHAPES

Mask = NDArray[np.bool_]
Pixels = NDArray[np.float32]

PALETTE = np.array(list(RGB.values()), np.float32) / 255
NAMES = list(RGB)
LEAST_AREA = 16
"""Least pixels of an object in a 64 x 64 image; smaller specks are noise."""
TOLERANCE = 0.22
"""Largest RGB distance of a pixel from a blend of the background with a colour."""
MALFORMED, CLEAR = 0.62, 0.88
"""The overlap with the best outline (intersection over union) up to which the score is 0, and from which it
is 1."""
THRESHOLD = 0.3
"""Least score of a detection, as in GenEval."""


def detect(image: Pixels) -> dict[str, list[dict[str, Any]]]:
    """The detections of each class in ``image`` (3, h, w), values in [0, 1], best first.

    A detection has ``box`` (x0, y0, x1, y1) in pixels, ``score`` in (0.3, 1] and ``color``.
    """
    pixels = np.ascontiguousarray(np.moveaxis(image, 0, 2), np.float32)
    scale = pixels.shape[0] * pixels.shape[1] / 64**2
    shapes: dict[str, list[dict[str, Any]]] = {}
    coverage, color = _explained(pixels)
    for index, name in enumerate(NAMES):
        for y, x in components((color == index) & (coverage > 0.5)):
            if len(y) < LEAST_AREA * scale:
                continue
            kind, score = classified(y, x)
            if score > THRESHOLD:
                box = [float(x.min()), float(y.min()), float(x.max()) + 1, float(y.max()) + 1]
                shapes.setdefault(kind, []).append({"box": box, "score": score, "color": name})
    for detections in shapes.values():
        detections.sort(key=lambda d: -d["score"])
    return shapes


def _explained(pixels: Pixels) -> tuple[Pixels, NDArray[np.int64]]:
    """How much of each pixel is a palette colour, (h, w) in [0, 1], and the colour's index (-1 for none)."""
    # shapes never touch the border, but may fill the middle of a row
    border = np.concatenate([pixels[:, :3], pixels[:, -3:]], axis=1)
    background = np.median(border, axis=1, keepdims=True)
    toward = PALETTE - background  # (h, 1, 3) against (4, 3) -> (h, 4, 3)
    away = pixels - background
    blend = np.einsum("hwc,hkc->hwk", away, toward) / np.square(toward).sum(-1)[:, None, :].clip(1e-6)
    blend = blend.clip(0, 1)
    residual = away[:, :, None, :] - blend[..., None] * toward[:, None, :, :]
    distance = np.sqrt(np.square(residual).sum(-1))
    best = distance.argmin(-1)
    near = np.take_along_axis(distance, best[..., None], -1)[..., 0] < TOLERANCE
    return np.take_along_axis(blend, best[..., None], -1)[..., 0], np.where(near, best, -1)


def components(mask: Mask) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
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


def classified(y: NDArray[np.int64], x: NDArray[np.int64]) -> tuple[str, float]:
    """The class of a component, given as the y and x of its pixels, and its score in [0, 1]."""
    height, width = int(np.ptp(y)) + 1, int(np.ptp(x)) + 1
    mask = np.zeros((height, width), bool)
    mask[y - y.min(), x - x.min()] = True
    v, u = np.mgrid[0:height, 0:width] + 0.5
    u, v = u / width, v / height
    outlines = {
        "circle": (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25,
        "square": np.ones_like(mask),
        "triangle": np.abs(u - 0.5) <= v / 2,
    }
    overlaps = {kind: (mask & outlines[kind]).sum() / (mask | outlines[kind]).sum() for kind in SHAPES}
    best = max(overlaps, key=lambda kind: overlaps[kind])
    # rendered shapes are as wide as high, a triangle a little wider
    stretch = min(width, height) / max(width, height)
    score = (overlaps[best] * min(1.0, stretch / 0.8) - MALFORMED) / (CLEAR - MALFORMED)
    return best, float(np.clip(score, 0, 1))
