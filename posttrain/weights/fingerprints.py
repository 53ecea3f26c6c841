"""Tells whether files are still those that something was made from.

A file's print is its size, its time of change and the SHA-256 of its content. The hash is what counts: copies
of a file are equal, and a weight that was changed by one bit is not. It is computed once, and taken from an
earlier print as long as size and time are the same, so only the first stage of a run reads the files: 16 GB
of Stable Diffusion 3.5 Medium with its text encoders, at 0.4 GB/s for each file or more, four at a time. A
sample of blocks would be read sooner, but the loader reads every byte anyway, and a sample misses a change of
one layer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain.weights.files import sha256_once

Prints = dict[str, dict[str, Any]]
"""Name of a file -> its ``size`` in bytes, ``mtime_ns`` and ``sha256``."""
THREADS = 4
"""Files that are hashed at once."""


def prints_of(files: Mapping[str, Path], known: Mapping[str, Any] | None = None) -> Prints:
    """The print of each of ``files``. Prints ``known`` from before hold while size and time are the same.

    Raises OSError for a file that cannot be read.
    """

    def made(name: str) -> dict[str, Any]:
        status = files[name].stat()
        now = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        before = (known or {}).get(name)
        if (
            isinstance(before, dict)
            and isinstance(before.get("sha256"), str)
            and now.items() <= before.items()
        ):
            return {**now, "sha256": before["sha256"]}
        return {**now, "sha256": sha256_once(files[name].resolve(), **now)}

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(files, pool.map(made, files), strict=True))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the files that were added, removed, or have another content."""

    def content(prints: Mapping[str, Any], name: str) -> Any:
        found = prints.get(name)
        return found.get("sha256") if isinstance(found, dict) else None

    return sorted(name for name in {*before, *now} if content(before, name) != content(now, name))


def by_component(prints: Mapping[str, Any]) -> dict[str, str]:
    """Component, which is the first folder of a file's name -> a hash of its files' names and contents."""
    components: dict[str, Any] = {}
    for name in sorted(prints):
        line = f"{name} {prints[name]['sha256']}\n".encode()
        components.setdefault(name.split("/")[0], hashlib.sha256()).update(line)
    return {name: digest.hexdigest()[:16] for name, digest in components.items()}


def named(names: Iterable[str]) -> str:
    """The first three of ``names``, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
