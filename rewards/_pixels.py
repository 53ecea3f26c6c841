"""How do published scorers turn images into what their networks see?

Scores depend on it by more than they differ between models, so each reward follows the preprocessing that its
published numbers were made with: of floats or of 8-bit images, by the shorter or the longer side.
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
"""Of the images that CLIP was trained on, by channel (BLIP uses them too)."""


def by_shorter_side(images: Tensor, size: int) -> Tensor:
    """Float ``images`` (n, 3, h, w), their shorter side made ``size``, the middle square of them, normalised.

    This is torchvision's Resize of tensors (bilinear, antialiased) and CenterCrop.
    """
    height, width = _shorter_to(size, images.shape[-2], images.shape[-1])
    resized = interpolate(images.float(), (height, width), mode="bilinear", antialias=True)
    return normalised(_middle(resized, size))


def by_longer_side(images: Tensor, size: int) -> Tensor:
    """Float ``images`` (n, 3, h, w), their longer side made ``size``, padded with black, normalised."""
    scale = size / max(images.shape[-2:])
    height, width = (round(side * scale) for side in images.shape[-2:])
    # values beyond [0, 1], which bicubic weights make, stay as they do in the published code
    resized = interpolate(images.float(), (height, width), mode="bicubic", antialias=True)
    top, left = (size - height) // 2, (size - width) // 2
    return normalised(pad(resized, (left, size - width - left, top, size - height - top)))


def of_pil(images: Sequence[Image.Image], size: int) -> Tensor:
    """8-bit ``images``, each by its shorter side to ``size`` (bicubic), the middle square, normalised.

    This is torchvision's Resize of PIL images, CenterCrop and ToTensor, and open_clip's preprocessing.
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
    mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) for c in (MEAN, STD))
    return (images - mean) / std


def _shorter_to(size: int, height: int, width: int) -> tuple[int, int]:
    # torchvision cuts the longer side off where others round it
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _middle(images: Tensor, size: int) -> Tensor:
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]
