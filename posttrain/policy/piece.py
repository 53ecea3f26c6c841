"""Pieces of tensors: what one process holds of a tensor that several have, and what one file has of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Consecutive numbers of a whole tensor in row-major order, as every layout of weights cuts them."""

    values: Tensor
    """The numbers, in any shape; none if this process has none of them."""
    shape: torch.Size
    """Of the whole tensor."""
    start: int = 0
    """How many numbers of the whole tensor come before."""
    everywhere: bool = False
    """Whether every process holds the whole tensor."""

    @property
    def end(self) -> int:
        """How many numbers of the whole tensor come before the first one after this piece."""
        return self.start + self.values.numel()

    def none(self) -> Piece:
        """A piece of the same tensor that has no numbers."""
        return replace(self, values=self.values.new_empty(0))

    def copied(self) -> Piece:
        """The same with a copy of the numbers in the CPU's memory."""
        return replace(self, values=self.values.detach().to("cpu", copy=True))


class Stored:
    """A whole tensor that lies in one piece or in several, such as memory-mapped files."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        """Raises ValueError unless the pieces are of one tensor, and have each of its numbers once."""
        self.pieces = sorted(pieces, key=lambda piece: piece.start)
        self.shape, self.dtype = self.pieces[0].shape, self.pieces[0].values.dtype
        end = 0
        for piece in self.pieces:
            if (piece.shape, piece.values.dtype) != (self.shape, self.dtype):
                raise ValueError(f"its pieces are of {list(self.shape)} and of {list(piece.shape)}")
            if piece.start != end:
                raise ValueError(
                    f"number {min(end, piece.start)} is {'twice' if piece.start < end else 'not'} there"
                )
            end = piece.end
        if end != self.shape.numel():
            raise ValueError(f"{end} of its {self.shape.numel()} numbers are there")

    @torch.no_grad()
    def read(self, target: Piece) -> None:
        """Set the values of ``target``, a piece of a tensor of this shape. Nothing else is read."""
        values = target.values
        flat = values.view(-1) if values.is_contiguous() else values.new_empty(values.numel())
        for piece in self.pieces:
            first, last = max(piece.start, target.start), min(piece.end, target.end)
            if first < last:
                numbers = piece.values.flatten()[first - piece.start : last - piece.start]
                flat[first - target.start : last - target.start].copy_(numbers)
        if not values.is_contiguous():
            values.copy_(flat.view(values.shape))

    def whole(self) -> Tensor:
        """The whole tensor. If it lies in one piece, the two share their memory."""
        if len(self.pieces) == 1:
            return self.pieces[0].values.view(self.shape)
        whole = torch.empty(self.shape, dtype=self.dtype)
        self.read(Piece(whole, self.shape))
        return whole
