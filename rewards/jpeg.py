"""Scores images by their size as JPEG files; needs no weights, so it suits smoke tests.

Pillow writes the files with quality 95, as in DDPO (Black et al. 2023, arXiv:2305.13301) and Flow-GRPO.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from posttrain.reward import Reward, Scores

if TYPE_CHECKING:
    from posttrain.reward import Scorer


class JpegIncompressibility(Reward):
    """The image's size as a JPEG in units of 1000 bytes. Detailed and noisy images score high."""

    type: Literal["jpeg_incompressibility"] = "jpeg_incompressibility"
    range: ClassVar = (0.0, float("inf"))

    def load(self, device: torch.device) -> Scorer:
        del device  # the file is written on the CPU

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            return Scores(kilobytes(images))

        return score


class JpegCompressibility(Reward):
    """Minus the image's size as a JPEG in units of 500000 bytes. Smooth and plain images score high."""

    type: Literal["jpeg_compressibility"] = "jpeg_compressibility"
    range: ClassVar = (-float("inf"), 0.0)

    def load(self, device: torch.device) -> Scorer:
        del device

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            return Scores(-kilobytes(images) / 500)

        return score


def kilobytes(images: Tensor) -> Tensor:
    """(n,) sizes of ``images`` (n, 3, h, w) in [0, 1] as JPEG files, in units of 1000 bytes."""
    from posttrain.support.images import to_pil

    sizes = []
    for image in to_pil(images):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)
