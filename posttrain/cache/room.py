"""Bounds the bytes that the cache takes on disk.

When more room is needed, the shard that was used longest ago is removed, whichever store it belongs to. A
process that has it open can still read it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from posttrain.errors import PosttrainError
from posttrain.support.files import locked, publish
from posttrain.support.terminal import note
from posttrain.support.wording import short
from posttrain.support.write_errors import problem

SHARD = f"{'[0-9a-f]' * 24}.safetensors"
"""The names of shards. The cache's folder may hold other safetensors files, which are somebody's weights."""
SHARDS = f"*/{SHARD}"
"""The shards of all stores, relative to the cache's folder."""


@dataclass(frozen=True)
class Demand:
    """The encodings that a stage or evaluation will read from one store."""

    name: str
    """What they are, in messages: ``sft: prompts``."""
    count: int
    """How many encodings."""
    missing: int
    """How many of them are still to be computed."""
    size: int
    """Bytes of all."""
    missing_size: int
    """Bytes of the missing ones."""


class Room:
    """The ``limit`` in bytes that all stores in the folder ``root`` share."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._used: set[Path] = set()
        self._reserved = 0

    def reserve(self, store: Path, demand: Demand, console: Console) -> None:
        """Reserve room for ``demand`` in the folder ``store``, and print how much it takes.

        Raises PosttrainError if all that was reserved exceeds the limit, or if the missing encodings exceed
        the free space of the disk.
        """
        self._reserved += demand.size
        size, missing_size = short(demand.size, "B"), short(demand.missing_size, "B")
        limit = short(self.limit, "B")
        if self._reserved > self.limit:
            raise PosttrainError(
                f"{demand.name}: {demand.count} encodings take {size}, with what is cached beside them "
                f"{short(self._reserved, 'B')}, more than cache.max_size, {limit}: raise it, "
                "cache less, or set cache.dtype to bf16"
            )
        if demand.missing_size > (free := shutil.disk_usage(store).free):
            raise PosttrainError(
                f"{demand.name}: {missing_size} are to be cached in {str(store)!r}, whose disk has "
                f"{short(free, 'B')} free: give another cache.path, or cache less"
            )
        if demand.missing:
            work = f"{demand.missing} of {demand.count} are to be encoded, {missing_size} of {size}"
        else:
            work = f"all {demand.count}, {size}"
        line = f"{demand.name}: {work}, in the cache {store} (limit {limit})"
        note(console, line)

    def use(self, shard: Path) -> None:
        """Mark ``shard`` as used now. From then on this process does not remove it."""
        self._used.add(shard)
        with contextlib.suppress(OSError):  # another user's file, or one that was just removed
            os.utime(shard)

    def publish(self, part: Path, shard: Path) -> None:
        """Rename ``part`` to ``shard``, after removing as many old shards as the limit demands.

        Raises PosttrainError if the shards that this process uses leave no room.
        """
        with self.locked():
            new_size = part.stat().st_size
            shards = sorted((f.stat().st_mtime_ns, f.stat().st_size, f) for f in self.root.glob(SHARDS))
            excess = sum(size for _, size, _ in shards) + new_size - self.limit
            for _, size, old in shards:
                if excess > 0 and old not in self._used:
                    old.unlink()
                    excess -= size
            if excess > 0:
                raise PosttrainError(
                    f"the cache {str(self.root)!r} is full of what this run uses: raise cache.max_size, "
                    f"{short(self.limit, 'B')}"
                )
            publish(part, shard)
            self._used.add(shard)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder: inside the block no other process adds or removes a shard."""
        with locked(self.root / ".lock"):
            yield


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write into a PosttrainError that names ``folder``; other exceptions pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PosttrainError) or (why := problem(error)) is None:
            raise
        raise PosttrainError(f"cannot write the cache {str(folder)!r}: {why}; see cache.path") from error
