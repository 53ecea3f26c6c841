"""Shapes as a model draws them: faint, blended, ragged and touching, each with its label by construction."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from posttrain.shapes.render import RGB, render
from posttrain.shapes.scene import COLORS, SHAPES, SIZE, Scene, Thing

FLAWS = ("faint", "ghost", "blended", "ragged", "touching")
GREY = ((240, 240, 240), (240, 240, 240))


@dataclass(frozen=True)
class Labelled:
    """An image (3, 64, 64) in [0, 1], and the shapes that a person sees in it."""

    pixels: np.ndarray
    things: tuple[Thing, ...]


def imperfect(flaw, index):
    """Image number ``index`` with this ``flaw``: one to three shapes on a tinted background, and noise."""
    rng = np.random.default_rng([FLAWS.index(flaw), index])
    tint = tuple(tuple(int(c) for c in rng.integers(205, 250, 3)) for _ in range(2))
    things = _touching(rng) if flaw == "touching" else _apart(rng, int(rng.integers(1, 4)))
    seen = things[: max(1, len(things) - 1)] if flaw == "ghost" else things
    pixels = _drawn((), tint)
    for thing in things:
        pixels = _over(pixels, thing, tint, rng, flaw, ghost=thing not in seen)
    blurred = _blurred(pixels, 1.0 if flaw == "ragged" else 0.6)
    return Labelled((blurred + rng.normal(0, 0.02, blurred.shape)).clip(0, 1).astype(np.float32), seen)


def _over(pixels, thing, tint, rng, flaw, ghost):
    """``pixels`` with ``thing`` drawn on them."""
    cover = _cover(thing, rng if flaw == "ragged" else None)
    color = np.array(RGB[thing.color])[:, None, None] / 255
    if flaw == "blended":
        # another colour fades in from one side, over a tenth to a third of the shape
        other = np.array(RGB[str(rng.choice([c for c in COLORS if c != thing.color]))])[:, None, None] / 255
        part = _faded(thing, cover, rng)
        color = (1 - part) * color + part * other
    alpha = rng.uniform(0.5, 0.85) if flaw == "faint" else rng.uniform(0.05, 0.15) if ghost else 1.0
    return pixels + alpha * cover * (color - pixels)


def _faded(thing, cover, rng):
    """How much of each pixel another colour takes, (64, 64) in [0, 0.9]: a tenth to a third of ``cover``."""
    y, x = np.mgrid[:SIZE, :SIZE]
    while True:
        angle, begin = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.4)
        along = ((x - thing.x) * np.cos(angle) + (y - thing.y) * np.sin(angle)) / thing.size
        part = ((along - begin) / 0.3).clip(0, 0.9)
        if 0.1 < (part * cover).sum() / cover.sum() < 0.33:
            return part


def _cover(thing, rng):
    """How much of each pixel ``thing`` covers, (64, 64) in [0, 1]; bent by up to a pixel if ``rng`` is given."""
    black = replace(thing, color="blue")
    pixels = _drawn((black,), ((255, 255, 255), (255, 255, 255)))
    cover = (1 - pixels[0]) / (1 - RGB["blue"][0] / 255)
    if rng is None:
        return cover
    y, x = np.mgrid[:SIZE, :SIZE].astype(float)
    waves = rng.uniform(0.2, 0.5, (2, 2)), rng.uniform(0, 2 * np.pi, 2)
    bent = [axis + 0.7 * np.sin(w[0] * x + w[1] * y + p) for axis, w, p in zip((y, x), *waves, strict=True)]
    (j, v), (i, u) = [(np.floor(b).astype(int).clip(0, SIZE - 2), b % 1) for b in bent]
    above, below = [(1 - u) * cover[row, i] + u * cover[row, i + 1] for row in (j, j + 1)]
    return (1 - v) * above + v * below


def _apart(rng, count):
    while True:
        things = [_thing(rng, *rng.uniform(13, 51, 2)) for _ in range(count)]
        gaps = [_gap(a, b) for i, a in enumerate(things) for b in things[:i]]
        if all(gap >= 3 for gap in gaps):
            return tuple(things)


def _touching(rng):
    """Two shapes that meet, on less than half of a side."""
    a = _thing(rng, 20.0, rng.uniform(20, 30))
    b = _thing(rng, 0.0, 0.0)
    if rng.random() < 0.5:
        b = replace(b, color=a.color)
    apart = (a.size + b.size) / 2 * (0.95 if "square" in (a.kind, b.kind) else 0.9)
    shift = rng.uniform(0.5, 0.7) * (a.size + b.size) / 2
    b = replace(b, x=a.x + apart, y=a.y + shift)
    return (a, b)


def _thing(rng, x, y):
    return Thing(
        str(rng.choice(SHAPES)), str(rng.choice(COLORS)), float(x), float(y), float(rng.uniform(12, 20))
    )


def _gap(a, b):
    return max(abs(a.x - b.x), abs(a.y - b.y)) - (a.size + b.size) / 2


def _drawn(things, background):
    return np.asarray(render(Scene(tuple(things), background, {}, "")), np.float32).transpose(2, 0, 1) / 255


def _blurred(pixels, radius):
    image = Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32).transpose(2, 0, 1) / 255
