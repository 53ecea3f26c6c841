"""Packs 2 x 2 latents into a token and back, as FLUX does, and gives the tokens' positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def packed(latents: Tensor) -> Tensor:
    """The tokens (n, h / 2 * w / 2, 4 c) of ``latents`` (n, c, h, w), row by row.

    A token has the 4 latents of each channel one after the other, from the upper left to the lower right.
    """
    n, c, h, w = latents.shape
    squares = latents.reshape(n, c, h // 2, 2, w // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`packed`: latents (n, c, height, width)."""
    n, _, channels = tokens.shape
    squares = tokens.reshape(n, height // 2, width // 2, channels // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(n, channels // 4, height, width)


def grid_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """The positions (rows * columns, 3) float32 of an image's tokens: 0, the row and the column."""
    import torch

    axes = torch.zeros(1), torch.arange(rows), torch.arange(columns)
    return torch.cartesian_prod(*(axis.to(device, torch.float32) for axis in axes))
