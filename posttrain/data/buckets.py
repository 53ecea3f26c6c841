"""Chooses the size at which an image is trained, and resizes and crops it to that size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from posttrain.data.table import Bucket
from posttrain.errors import DataError
from posttrain.support.wording import nearest

MAX_ASPECT = 2
"""Buckets have aspect ratios from 1:2 to 2:1. A longer image is cropped at its ends."""


def bucket_sizes(resolution: int, divisor: int) -> list[Bucket]:
    """Sizes with sides that are multiples of ``divisor`` pixels and areas near ``resolution`` squared.

    For each side the other side is the one of nearest area (of two equally near, the smaller). The transpose
    of each size is a size as well. The list is sorted. Raises DataError if ``resolution < divisor``.
    """
    if resolution < divisor:
        raise DataError(
            f"resolution {resolution} is below {divisor} pixels, the smallest that this model supports"
        )
    area, sizes = resolution**2, set()
    for width in range(divisor, 2 * MAX_ASPECT * resolution, divisor):
        below = area // width // divisor * divisor
        height = min((below, below + divisor), key=lambda side: abs(width * side - area))
        if height and max(width, height) <= MAX_ASPECT * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio differs by the least factor; of these the largest, then the widest."""

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        # A single division is correctly rounded, so every machine chooses alike.
        across, down = width * bucket[1], height * bucket[0]
        return max(across, down) / min(across, down), -bucket[0] * bucket[1], -bucket[0]

    return min(buckets, key=distance)


def bucket_problem(bucket: Bucket, divisor: int, max_pixels: int) -> str | None:
    """Why a row's bucket cannot be used, with the nearest allowed sides; None if it can be used."""
    for name, side in zip(("bw", "bh"), bucket, strict=True):
        if side % divisor:
            return f"{name} {side} is not a multiple of {divisor}; {nearest(side, divisor)}"
    if bucket[0] * bucket[1] > max_pixels:
        return f"a bucket of {bucket[0]} x {bucket[1]} pixels is more than max_pixels ({max_pixels})"
    return None


def cover_and_crop(
    image: Image.Image, bucket: Bucket, offsets: tuple[float, float], flip: bool
) -> NDArray[np.uint8]:
    """``image``, resized (Lanczos) to just cover ``bucket``, cropped to it, and mirrored if ``flip``.

    ``offsets`` (x, y), each in [0, 1), choose one of the whole-pixel positions of the crop: 0 is left or top,
    0.5 the centre. Uniform offsets make all positions equally likely. Returns (height, width, 3) uint8.
    """
    scale = max(bucket[0] / image.width, bucket[1] / image.height)
    box = []
    for side, full, offset in zip(bucket, image.size, offsets, strict=True):
        spare = int(full * scale + 1e-6) - side  # 1e-6: the product may be just below a whole number
        start = max(0.0, min(int(offset * (spare + 1)) / scale, full - side / scale))
        box.append((start, min(start + side / scale, full)))
    (left, right), (top, bottom) = box
    # Resize only the part that is kept: covering 512 x 512 with a whole 1 x 1000 image would take 800 MB.
    image = image.resize(bucket, Image.Resampling.LANCZOS, box=(left, top, right, bottom))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """``images`` (n, h, w, 3) uint8 as a tensor (n, 3, h, w), float32 in [-1, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
