"""Lists what the cache folder holds, and empties it."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.cache.room import SHARD, Room, writing
from posttrain.cache.store import ABOUT

KEPT = {"images": "what was read of large data sets", "counts": "what plans counted"}
"""Folders in the user's cache folder beside the stores -> what their files keep. They only save time."""


@dataclass(frozen=True)
class StoreSummary:
    """A store on disk: the encodings of one kind by one encoder."""

    folder: Path
    about: dict[str, Any]
    """What the encodings are a function of, as :func:`posttrain.cache.keys.store_identity` describes it."""
    size: int
    """Bytes of the shards."""
    files: int
    """Number of shards."""
    used: float | None
    """When a shard was last used, in seconds since 1970; None if there is no shard."""


def contents(root: Path) -> list[StoreSummary]:
    """The stores in the folder ``root``, the most recently used first."""
    found = (_summary(file) for file in root.glob(f"*/{ABOUT}"))
    # others may name a file so; one of a store may be damaged
    stores = (store for store in found if store.files or "kind" in store.about)
    return sorted(stores, key=lambda store: store.used or 0.0, reverse=True)


def _summary(file: Path) -> StoreSummary:
    """The summary of the store whose ABOUT file is ``file``."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = None
    shards = []
    for shard in file.parent.glob(SHARD):
        with contextlib.suppress(FileNotFoundError):  # another process may remove it meanwhile
            shards.append(shard.stat())
    used = max((status.st_mtime for status in shards), default=None)
    known = about if isinstance(about, dict) else {}
    return StoreSummary(file.parent, known, sum(status.st_size for status in shards), len(shards), used)


def clear(root: Path) -> int:
    """Remove every store in the folder ``root``, and no other file. Returns the number of bytes freed.

    Runs that read from a store can go on, and runs that fill one write it again. Raises PosttrainError if a
    file cannot be removed.
    """
    stores = contents(root)
    if not stores:
        return 0
    with writing(root), Room(root, 0).locked():
        for store in stores:
            for pattern in (SHARD, ".*.part", ABOUT):
                for file in store.folder.glob(pattern):
                    file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder stays if it holds other files
                store.folder.rmdir()
    return sum(store.size for store in stores)


def kept_beside(user_folder: Path) -> dict[str, int]:
    """What the user's cache folder keeps beside the stores, in words -> its bytes, where there is any."""
    sizes = {words: sum(size for _, size in _kept_in(user_folder / name)) for name, words in KEPT.items()}
    return {words: size for words, size in sizes.items() if size}


def clear_beside(user_folder: Path) -> int:
    """Remove what the user's cache folder keeps beside the stores. Returns the number of bytes freed.

    Raises PosttrainError if a file cannot be removed.
    """
    freed = 0
    for folder in (user_folder / name for name in KEPT):
        with writing(folder):
            for file, size in _kept_in(folder):
                file.unlink(missing_ok=True)
                freed += size
        with contextlib.suppress(OSError):  # it stays if it holds other files
            folder.rmdir()
    return freed


def _kept_in(folder: Path) -> list[tuple[Path, int]]:
    """The files that keep something in ``folder``, and their bytes."""
    found = []
    for file in (*folder.glob("*.json"), *folder.glob(".*.json.*.part")):
        with contextlib.suppress(FileNotFoundError):  # another process may rename it meanwhile
            found.append((file, file.stat().st_size))
    return found


def age(when: float | None) -> str:
    """``3 h ago``: how long ago ``when`` (seconds since 1970) was; a dash for None."""
    if when is None:
        return "–"
    passed = max(time.time() - when, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{passed / length:.0f} {unit} ago"
    return "now"
