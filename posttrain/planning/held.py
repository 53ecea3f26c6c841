"""Counts the bytes that a computation holds at a time."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.planning.profile import Profile, Segment


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside the ``with`` block and still alive.

    If the computation has ``rows`` rows, every storage whose bytes are a multiple of ``rows`` counts as made
    of so many rows: ``rows`` must be a prime that is no factor of other storages' bytes. Then :meth:`peak`
    knows the bytes for any number of rows. With 0 rows all bytes are fixed.
    """

    def __init__(self, rows: int = 0) -> None:
        super().__init__()
        self.rows = rows
        self._segments = [Segment(1)]
        self._alive: dict[int, Segment] = {}

    def mark(self, copies: int, *, of_all: bool = False) -> None:
        """Begin a segment. ``of_all``: what is freed in it is freed for each copy of the segment that made
        it."""
        self._segments.append(Segment(copies, of_all=of_all))

    def peak(self, rows: int = 1) -> int:
        """The most bytes held at a time, if the computation had ``rows`` rows."""
        return self.profile().peak(rows)

    def profile(self) -> Profile:
        """What was held, without the tensors."""
        return Profile(self._segments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if (key := storage._cdata) in before or key in self._alive:
                continue
            size = storage.nbytes()
            each = size // self.rows if self.rows and size % self.rows == 0 else 0
            fixed = 0 if each else size
            self._alive[key] = self._segments[-1]
            self._segments[-1].add(fixed, each)
            weakref.finalize(storage, self._freed, key, fixed, each)
        return out

    def _freed(self, key: int, fixed: int, each: int) -> None:
        made, now = self._alive.pop(key), self._segments[-1]
        times = made.copies if now.of_all else 1
        now.add(-fixed * times, -each * times)
