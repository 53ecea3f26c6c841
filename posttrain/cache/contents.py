"""What is in the cache folder, and how is it emptied?"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.cache.room import Room, writing
from posttrain.cache.store import ABOUT


@dataclass(frozen=True)
class Kept:
    """A store: encodings of one kind by one encoder."""

    folder: Path
    about: dict[str, Any]
    size: int
    """Bytes of its shards."""
    files: int
    used: float | None
    """When one of its shards was last used, in seconds since 1970; None where it has none."""


def contents(root: Path) -> list[Kept]:
    """The stores in ``root``, the one used last first."""
    found = []
    for about in root.glob(f"*/{ABOUT}"):
        try:
            described = json.loads(about.read_text())
        except (OSError, ValueError):
            described = {}
        sizes = []
        for shard in about.parent.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                status = shard.stat()
                sizes.append((status.st_mtime, status.st_size))
        used = max((mtime for mtime, _ in sizes), default=None)
        found.append(Kept(about.parent, described, sum(size for _, size in sizes), len(sizes), used))
    return sorted(found, key=lambda kept: kept.used or 0.0, reverse=True)


def clear(root: Path) -> int:
    """Remove every store in ``root``, and nothing else that lies there; returns the bytes that were freed.

    Runs that read from it go on; those that fill it write anew. Raises PosttrainError where a file cannot
    be removed.
    """
    stores = contents(root)
    if not stores:
        return 0
    with writing(root), Room(root, 0).locked():
        for kept in stores:
            for pattern in ("*.safetensors", ".*.part", ABOUT):
                for file in kept.folder.glob(pattern):
                    file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what is not the cache's own stays
                kept.folder.rmdir()
    return sum(kept.size for kept in stores)


def age(seconds: float | None) -> str:
    """How long ago a time was, as a person says it; a dash for None."""
    if seconds is None:
        return "–"
    passed = max(time.time() - seconds, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{passed / length:.0f} {unit} ago"
    return "now"
