"""Which size is an image trained at, and how is it brought there?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from posttrain.data.rows import Bucket
from posttrain.errors import DataError
from posttrain.support.wording import multiples_near

MAX_ASPECT = 2
"""Buckets go from 1:2 to 2:1; a longer image loses its ends."""


def bucket_sizes(resolution: int, divisor: int) -> list[Bucket]:
    """Sorted sizes with sides that are multiples of ``divisor`` pixels and areas near ``resolution`` squared.

    For each side the other one is chosen for the nearest area (the smaller where two are equally near).
    With each size its transpose is there too. Raises DataError if ``resolution`` is below ``divisor``.
    """
    if resolution < divisor:
        raise DataError(f"resolution {resolution} is below {divisor} pixels, the least this model can show")
    area, sizes = resolution**2, set()
    for width in range(divisor, 2 * MAX_ASPECT * resolution, divisor):
        below = area // width // divisor * divisor
        height = min((below, below + divisor), key=lambda side: abs(width * side - area))
        if height and max(width, height) <= MAX_ASPECT * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest by factor; of equals the largest, then the widest."""

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        # One correctly rounded division, so that every machine decides alike.
        across, down = width * bucket[1], height * bucket[0]
        return max(across, down) / min(across, down), -bucket[0] * bucket[1], -bucket[0]

    return min(buckets, key=distance)


def bucket_problem(bucket: Bucket, divisor: int, max_pixels: int) -> str | None:
    """Why a row's bucket cannot be used, with the nearest sides that can; None if it can."""
    for name, side in zip(("bw", "bh"), bucket, strict=True):
        if side % divisor:
            near = multiples_near(side, divisor)
            return f"{name} {side} is not a multiple of {divisor}; the nearest is {near}"
    if bucket[0] * bucket[1] > max_pixels:
        return f"a bucket of {bucket[0]} x {bucket[1]} pixels is more than max_pixels ({max_pixels})"
    return None


def cover_resize_and_crop(
    image: Image.Image, bucket: Bucket, offsets: tuple[float, float], flip: bool
) -> Tensor:
    """(3, height, width) float32 in [-1, 1]: :func:`cover_and_crop` as a tensor."""
    return to_pixels(cover_and_crop(image, bucket, offsets, flip)[None])[0]


def cover_and_crop(
    image: Image.Image, bucket: Bucket, offsets: tuple[float, float], flip: bool
) -> NDArray[np.uint8]:
    """(height, width, 3) bytes: ``image`` resized (Lanczos) to just cover ``bucket``, cropped, mirrored.

    ``offsets`` (x, y), each in [0, 1), choose among the whole-pixel positions of the crop, all equally
    likely for uniform offsets: 0 is left or top, 0.5 the centre.
    """
    scale = max(bucket[0] / image.width, bucket[1] / image.height)
    box = []
    for side, full, offset in zip(bucket, image.size, offsets, strict=True):
        spare = int(full * scale + 1e-6) - side  # 1e-6: a product just below a whole pixel
        start = max(0.0, min(int(offset * (spare + 1)) / scale, full - side / scale))
        box.append((start, min(start + side / scale, full)))
    (left, right), (top, bottom) = box
    # Resizing only what is kept: a 1 x 1000 image covering 512 x 512 would need 800 MB whole.
    image = image.resize(bucket, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """(n, 3, h, w) float32 in [-1, 1] of (n, h, w, 3) bytes."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
