"""Keeps what was read of large data sets, so that a million images are not opened twice.

Files lie in ``images`` of the user's cache folder. They only save time: what is missing, damaged, or cannot
be written is read again from the images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.support.files import write
from posttrain.support.paths import default_folder

LEAST = 1000
"""Entries below which nothing is kept, since reading them again takes about a second."""


def file_of(*parts: object) -> Path:
    """The file that keeps what was read of the thing that ``parts`` identify."""
    name = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]
    return default_folder() / "images" / f"{name}.json"


def kept(file: Path, kind: type) -> Any:
    """The value in ``file``; an empty one of its ``kind`` if there is none or the file is damaged."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def keep(file: Path, value: list[Any] | dict[str, Any]) -> None:
    """Keep ``value`` in ``file`` if it is large enough to be worth it, and if the disk lets us."""
    if len(value) >= LEAST:
        with contextlib.suppress(PosttrainError, OSError):
            write(file, json.dumps(value, separators=(",", ":")))
