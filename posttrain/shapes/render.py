"""Renders a scene as an image."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from posttrain.shapes.scene import SIZE, Scene, Thing

RGB = {"red": (214, 48, 49), "green": (46, 160, 67), "blue": (38, 92, 214), "yellow": (245, 196, 26)}
OVERSAMPLING = 4


def render(scene: Scene) -> Image.Image:
    """The scene as a 64 x 64 RGB image, antialiased."""
    ramp = np.linspace(scene.background[0], scene.background[1], SIZE)[:, None, :]
    pixels = np.broadcast_to(np.round(ramp), (SIZE, SIZE, 3)).astype(np.uint8)
    big = SIZE * OVERSAMPLING
    image = Image.fromarray(pixels).resize((big, big), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(draw, thing)
    return image.reduce(OVERSAMPLING)


def outline(thing: Thing) -> list[tuple[float, float]]:
    """The corners (x, y) of a square or triangle in pixels. A triangle stands on its base."""
    half = thing.size / 2
    if thing.kind == "square":
        half *= 0.9  # a square of full size would look larger than a circle
        return [(thing.x + i * half, thing.y + j * half) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    height = thing.size * math.sqrt(3) / 2
    top, bottom = thing.y - height / 2, thing.y + height / 2
    return [(thing.x, top), (thing.x + half, bottom), (thing.x - half, bottom)]


def _draw(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    fill, k = RGB[thing.color], OVERSAMPLING
    if thing.kind == "circle":
        half = thing.size / 2
        box = [(thing.x - half) * k, (thing.y - half) * k, (thing.x + half) * k, (thing.y + half) * k]
        draw.ellipse(box, fill=fill)
    else:
        draw.polygon([(x * k, y * k) for x, y in outline(thing)], fill=fill)
