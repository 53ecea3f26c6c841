"""Resizes and normalises images as the published scorers do.

The preprocessing changes scores by more than trained models differ. So each reward uses the preprocessing
behind its published numbers: on floats or 8-bit images, by the shorter or the longer side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

if TYPE_CHECKING:
    from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training images by channel; BLIP uses the same."""


def by_shorter_side(images: Tensor, size: int) -> Tensor:
    """Resize ``images`` (n, 3, h, w) in [0, 1] by the shorter side, crop the middle square, and normalise.

    Returns (n, 3, size, size). Equals torchvision's Resize of tensors (bilinear, antialiased) and CenterCrop.
    """
    height, width = _shorter_to(size, images.shape[-2], images.shape[-1])
    resized = interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
    return normalised(_middle(resized, size))


def by_longer_side(images: Tensor, size: int) -> Tensor:
    """Resize ``images`` (n, 3, h, w) in [0, 1] by the longer side, pad with black, and normalise.

    Returns (n, 3, size, size). Equals HPSv2's published preprocessing (bicubic, antialiased).
    """
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    # bicubic weights overshoot [0, 1]; the published code does not clip, so neither does this
    resized = interpolate(images.float(), (height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return normalised(pad(resized, (left, size - width - left, top, size - height - top)))


def of_pil(images: Sequence[Image.Image], size: int) -> Tensor:
    """Resize 8-bit ``images`` by their shorter sides (bicubic), crop the middle squares, and normalise.

    Returns (n, 3, size, size). Equals torchvision's Resize of PIL images, CenterCrop and ToTensor, which is
    also open_clip's preprocessing.
    """
    from PIL import Image

    squares = []
    for image in images:
        height, width = _shorter_to(size, image.height, image.width)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        squares.append(_middle(tensor, size))
    return normalised(torch.stack(squares))


def normalised(images: Tensor) -> Tensor:
    """``images`` (..., 3, h, w) in [0, 1], shifted and scaled by CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) for c in (MEAN, STD))
    return (images - mean) / std


def _shorter_to(size: int, height: int, width: int) -> tuple[int, int]:
    # int, not round: torchvision rounds the longer side down
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _middle(images: Tensor, size: int) -> Tensor:
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]
