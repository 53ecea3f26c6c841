"""Draws random numbers as a function of a key, without generator state.

The key is (seed, stage depth, step or epoch, purpose, sample id). So a recipe draws the same numbers on any
number of processes and workers, and a resumed run needs no saved generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """A CPU generator whose seed is a 64-bit hash of ``key``. Equal keys give equal streams.

    The key's elements are integers and strings. The hash separates them: ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch. Those of a sample depend on its id and not on the other samples.

    ``key`` is (seed, stage depth, step or epoch); ``ids`` are the ids of the n samples.
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
        """One integer from ``low`` to ``high``, both included, for the whole batch."""
        return int(torch.randint(low, high + 1, (), generator=generator(*self.key, purpose)))

    def permutations(self, purpose: str, size: int) -> Tensor:
        """(n, size) int64: for each sample a random order of 0 to size - 1."""
        rows = [torch.randperm(size, generator=generator(*self.key, purpose, i)) for i in self.ids]
        return torch.stack(rows).to(self.device)

    def take(self, index: slice) -> Draws:
        """The draws of the samples in the slice ``index``."""
        return replace(self, ids=self.ids[index])

    def of(self, ids: Sequence[int | str]) -> Draws:
        """The draws for other ``ids``. Samples with equal ids get equal numbers."""
        return replace(self, ids=ids)

    def _stack(self, draw, purpose: str, shape: Sequence[int]) -> Tensor:
        rows = [draw(tuple(shape), generator=generator(*self.key, purpose, i)) for i in self.ids]
        return torch.stack(rows).to(self.device)
