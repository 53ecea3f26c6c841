"""How much may the cache take, and what goes when more is needed?

What goes is the shard that was used longest ago, of any store. A process that has it open keeps reading it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from posttrain.errors import PosttrainError
from posttrain.support.files import locked, problem, publish
from posttrain.support.wording import short

SHARDS = "*/*.safetensors"


class Room:
    """The ``limit`` bytes that all stores in ``root`` take together."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._used: set[Path] = set()
        self._reserved = 0

    def reserve(
        self,
        store: Path,
        what: str,
        count: int,
        missing: int,
        needed_bytes: int,
        missing_bytes: int,
        console: Console,
    ) -> None:
        """Say how much ``count`` encodings take, ``missing`` of them still to be made and kept in ``store``.

        Raises PosttrainError where, beside what was reserved before, they are more than the limit allows,
        or more than the disk has free.
        """
        self._reserved += needed_bytes
        needed, new = short(needed_bytes, "B"), short(missing_bytes, "B")
        limit = short(self.limit, "B")
        if self._reserved > self.limit:
            raise PosttrainError(
                f"{what}: {count} encodings take {needed}, with what is cached beside them "
                f"{short(self._reserved, 'B')}, more than cache.max_size, {limit}: raise it, "
                "cache less, or set cache.dtype to bf16"
            )
        if missing_bytes > (free := shutil.disk_usage(store).free):
            raise PosttrainError(
                f"{what}: {new} are to be cached in {str(store)!r}, whose disk has {short(free, 'B')} "
                "free: give another cache.path, or cache less"
            )
        todo = (
            f"{missing} of {count} are to be encoded, {new} of {needed}"
            if missing
            else f"all {count}, {needed}"
        )
        line = f"{what}: {todo}, in the cache {store} (limit {limit})"
        console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)

    def use(self, shard: Path) -> None:
        """Mark ``shard`` as used now; this process does not remove it any more."""
        self._used.add(shard)
        with contextlib.suppress(OSError):  # another user's file, or one that was just removed
            os.utime(shard)

    def publish(self, part: Path, shard: Path) -> None:
        """Rename ``part`` to ``shard`` after removing what must go. Raises PosttrainError where what this
        process uses leaves no room."""
        with self.locked():
            size = part.stat().st_size
            files = sorted((f.stat().st_mtime_ns, f.stat().st_size, f) for f in self.root.glob(SHARDS))
            over = sum(bytes_ for _, bytes_, _ in files) + size - self.limit
            for _, bytes_, file in files:
                if over > 0 and file not in self._used:
                    file.unlink()
                    over -= bytes_
            if over > 0:
                raise PosttrainError(
                    f"the cache {str(self.root)!r} is full of what this run uses: raise cache.max_size, "
                    f"{short(self.limit, 'B')}"
                )
            publish(part, shard)
            self._used.add(shard)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: no shard appears or is removed by another process meanwhile."""
        with locked(self.root / ".lock"):
            yield


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while writing to ``folder`` into a PosttrainError that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PosttrainError) or (why := problem(error)) is None:
            raise
        raise PosttrainError(f"cannot write the cache {str(folder)!r}: {why}; see cache.path") from error
