"""Draws the images and prompts of a conformance file, the same on every machine.

They are made of integers and Pillow's built-in bitmap letters only. Smoothed outlines and rendered fonts
differ between versions of Pillow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Bytes = NDArray[np.uint8]

COUNT = 12
SIZES = ((64, 64), (128, 96), (224, 224), (192, 256))
"""(width, height) in pixels, of three images each. Images of one size are scored in one batch."""
COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 200, 30)}
WORDS = ("STOP", "OPEN", "CAFE", "EXIT")
SEED_STEP, MULTIPLIER, INCREMENT = 7919, 1664525, 1013904223


def probe(index: int) -> tuple[Image.Image, dict[str, Any]]:
    """Image ``index`` (0 to COUNT - 1), 8-bit RGB, and its prompt with GenEval's metadata.

    The images show, in turn, coloured shapes, a word, and a street sign with a word amid noise. Every prompt
    asks for a quoted word and an object, so that every reward can judge it. Some images lack what was asked
    for, so that scores differ.
    """
    group, kind = divmod(index, 3)
    width, height = SIZES[group]
    word, (color, rgb) = WORDS[group], list(COLORS.items())[group]
    pixels = _gradient(width, height, index)
    if kind == 0:
        shape, count = ("circle", 1) if group % 2 == 0 else ("square", 2)
        pixels[:] = 235
        pixels[_inside(shape, width, height, width // 3, height // 2, min(width, height) // 6)] = rgb
        other = COLORS["blue" if color != "blue" else "red"]
        pixels[_inside("square", width, height, 3 * width // 4, height // 3, min(width, height) // 9)] = other
        scene = f"a photo of {('a', 'two')[count - 1]} {color} {shape}{'s' * (count - 1)}"
        include = {"class": shape, "count": count, "color": color}
        return Image.fromarray(pixels), _row(f'{scene} and the word "{word}"', include)
    if kind == 1:
        pixels[_letters(word, width, height)] = (20, 20, 20)
        return Image.fromarray(pixels), _row(f'a photo of a clock that says "{word}"', {"class": "clock"})
    pixels = (pixels // 2 + _noise(width, height, index) // 2).astype(np.uint8)
    pixels[_inside("octagon", width, height, width // 2, height // 2, 2 * min(width, height) // 5)] = (
        190,
        20,
        30,
    )
    pixels[_letters(word, width, height)] = 255
    asked = word + "ED" * (group % 2)
    return Image.fromarray(pixels), _row(
        f'a photo of a stop sign that says "{asked}"', {"class": "stop sign"}
    )


def _row(prompt: str, include: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt, "tag": "conformance", "include": [{"count": 1, **include}]}


def _gradient(width: int, height: int, index: int) -> Bytes:
    y, x = np.mgrid[:height, :width]
    channels = 255 - 120 * x // width, 255 - 90 * y // height, 160 + (x + y + 13 * index) % 64
    return np.stack(channels, axis=2).astype(np.uint8)


def _noise(width: int, height: int, seed: int) -> Bytes:
    """Three random bytes for each pixel, by the linear congruential generator of Numerical Recipes.

    A library's generator could change between versions.
    """
    values = np.arange(width * height * 3, dtype=np.uint32) + np.uint32(SEED_STEP * seed)
    for _ in range(3):
        values = values * np.uint32(MULTIPLIER) + np.uint32(INCREMENT)
        values ^= values >> np.uint32(15)
    return (values >> np.uint32(24)).astype(np.uint8).reshape(height, width, 3)


def _inside(shape: str, width: int, height: int, x0: int, y0: int, radius: int) -> NDArray[np.bool_]:
    y, x = np.mgrid[:height, :width]
    dx, dy = abs(x - x0), abs(y - y0)
    if shape == "circle":
        return dx * dx + dy * dy <= radius * radius
    square = np.maximum(dx, dy) <= radius
    return square if shape == "square" else square & (5 * (dx + dy) <= 7 * radius)


def _letters(word: str, width: int, height: int) -> NDArray[np.bool_]:
    """The mask (height, width) of ``word`` in the middle, scaled up to at most two thirds of the width."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = (int(v) for v in font.getbbox(word))
    small = Image.new("1", (right - left, bottom - top))
    ImageDraw.Draw(small).text((-left, -top), word, 1, font)
    factor = max(1, 2 * width // 3 // small.width)
    large = np.kron(np.asarray(small, np.uint8), np.ones((factor, factor), np.uint8)).astype(bool)
    mask = np.zeros((height, width), bool)
    y, x = (height - large.shape[0]) // 2, (width - large.shape[1]) // 2
    mask[y : y + large.shape[0], x : x + large.shape[1]] = large
    return mask
