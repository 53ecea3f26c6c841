"""Reads text files line by line and lists the lines that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

SHOWN_PROBLEMS = 10
"""Problems listed in one message."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the row at ``line`` (from 1) cannot be used. ``path`` is its image, if known."""

    line: int
    path: Path | None
    reason: str

    def __str__(self) -> str:
        return f"{self.line}: {self.reason}" + (f" ({self.path})" if self.path else "")


def listing(file: Path, problems: Sequence[Problem]) -> str:
    """The first ten of ``problems``, each on a line as ``file:line: reason``, and how many more there are."""
    shown = [f"\n  {file}:{problem}" for problem in problems[:SHOWN_PROBLEMS]]
    more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return "".join(shown) + more


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, stripped bytes) of each line that is not blank, without a byte order mark.

    Raises DataError if ``file`` is missing, a folder, unreadable, or binary.
    """
    try:
        with file.open("rb") as handle:
            head = handle.read(4096)
            if b"\0" in head:
                raise DataError(f"{file}: not a text file; it must be UTF-8 text with one row per line")
            handle.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            for number, raw in enumerate(handle, 1):
                if raw := raw.strip():
                    yield number, raw
    except OSError as error:
        raise DataError(f"{file}: {(error.strerror or str(error)).lower()}") from error


def text(raw: bytes) -> str:
    """``raw`` decoded. Raises ValueError if it is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from error


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that the line ``raw`` holds. Raises ValueError if it is anything else."""
    try:
        row = json.loads(text(raw))
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("broken JSON: nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {type(row).__name__}")
    return row


def string(row: dict[str, Any], key: str) -> str:
    """The stripped string at ``key``. Raises ValueError if it is missing, empty, or not text."""
    if key not in row:
        raise ValueError(f"no '{key}' (found: {', '.join(map(repr, row)) or 'nothing'})")
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"'{key}' must be text, not {json.dumps(value)[:60]}")
    if not (value := value.strip()):
        raise ValueError(f"'{key}' is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"'{key}' has half a surrogate pair, which is no text")
    return value
