"""Randomness as a function: every draw comes from a counter, never from a state.

A draw is keyed by (seed, stage depth, purpose, step or epoch, sample id), so the same recipe draws the
same numbers on any number of processes and workers, and a resumed run needs no generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a 64-bit hash of ``key``; equal keys give equal streams.

    Key parts are ints and strings; they are separated in the hash, so ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


@dataclass(frozen=True)
class Draws:
    """The draws of one batch: each sample's numbers depend on its own id alone, not on its neighbours.

    ``key`` is (seed, stage depth, step or epoch); ``ids`` are the n samples' ids.
    """

    key: tuple[object, ...]
    ids: Sequence[int | str]
    device: torch.device | str = "cpu"

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """(n, *shape) standard normal float32 values."""
        return self._stack(torch.randn, purpose, shape)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(n, *shape) float32 values in [0, 1)."""
        return self._stack(torch.rand, purpose, shape)

    def integer(self, purpose: str, low: int, high: int) -> int:
        """One integer from ``low`` to ``high``, both included, the same for every sample of the batch."""
        return int(torch.randint(low, high + 1, (), generator=generator(*self.key, purpose)))

    def permutations(self, purpose: str, size: int) -> Tensor:
        """(n, size) int64: an own order of 0 to size - 1 for each sample."""
        rows = [torch.randperm(size, generator=generator(*self.key, purpose, i)) for i in self.ids]
        return torch.stack(rows).to(self.device)

    def take(self, index: slice) -> Draws:
        """The draws of some of the samples."""
        return replace(self, ids=self.ids[index])

    def of(self, ids: Sequence[int | str]) -> Draws:
        """The draws of other ids: samples of equal id draw alike."""
        return replace(self, ids=ids)

    def _stack(self, draw, purpose: str, shape: Sequence[int]) -> Tensor:
        rows = [draw(tuple(shape), generator=generator(*self.key, purpose, i)) for i in self.ids]
        return torch.stack(rows).to(self.device)
