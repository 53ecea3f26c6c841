"""Reads text files line by line and lists the lines that cannot be used."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import DataError

SHOWN_PROBLEMS = 10
"""Problems listed in one message."""
MAX_LINE = 1_000_000
"""Bytes of a line. A longer one is not read into memory."""
MAX_TEXT = 20_000
"""Characters of a prompt or caption. Text encoders read no more than 512 tokens."""
MAX_DIGITS = 18
"""Digits of a whole number in a row."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used. ``path`` is its image, if known."""

    line: int
    """Line or row, from 1; 0 if ``file`` alone names the row."""
    path: Path | None
    reason: str
    file: Path | None = None
    """The file that the row is in, if it is not the one that the recipe names."""

    def __str__(self) -> str:
        at = f"{self.line}: " if self.line else f"{self.file}: "
        return f"{at}{self.reason}" + (f" ({self.path})" if self.path else "")

    @property
    def row(self) -> tuple[Path | None, int]:
        """What tells the row from all others."""
        return self.file, self.line

    def located(self, file: Path) -> str:
        """The problem with its file and line, as ``file:line: reason``. ``file`` is the one that the recipe
        names."""
        return f"{self.file or file}:{self}" if self.line else str(self)


def listing(file: Path, problems: Sequence[Problem]) -> str:
    """The first ten of ``problems``, each on a line as ``file:line: reason``, and how many more there are."""
    shown = [f"\n  {problem.located(file)}" for problem in problems[:SHOWN_PROBLEMS]]
    more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return "".join(shown) + more


def one_for_each_row(problems: Iterable[Problem]) -> list[Problem]:
    """The first of the ``problems`` of each row, sorted by file and line."""
    by_row: dict[tuple[Path | None, int], Problem] = {}
    for problem in problems:
        by_row.setdefault(problem.row, problem)
    return sorted(by_row.values(), key=lambda problem: (str(problem.file), problem.line))


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, stripped bytes) of each line that is not blank, without a byte order mark.

    Of a line longer than MAX_LINE the beginning is given, which :func:`text` refuses. Raises DataError if
    ``file`` is missing, a folder, unreadable, or binary.
    """
    try:
        with file.open("rb") as handle:
            head = handle.read(4096)
            if b"\0" in head:
                raise DataError(f"{file}: not a text file; it must be UTF-8 text with one row per line")
            handle.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
            number = 0
            while raw := handle.readline(MAX_LINE + 1):
                number, rest = number + 1, raw
                while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
                    rest = handle.readline(MAX_LINE + 1)
                if raw := raw.strip():
                    yield number, raw
    except OSError as error:
        raise DataError(f"{file}: {(error.strerror or str(error)).lower()}") from error


def text(raw: bytes) -> str:
    """``raw`` decoded. Raises ValueError if it is not UTF-8, or longer than MAX_LINE bytes."""
    if len(raw) > MAX_LINE:
        raise ValueError(f"the line has more than {MAX_LINE:,} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from error


def json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that the line ``raw`` holds. Raises ValueError if it is anything else, gives a key
    twice, or has a number that is not finite or has more than MAX_DIGITS digits."""
    try:
        row = json.loads(
            text(raw), object_pairs_hook=_distinct, parse_int=_int, parse_float=_float, parse_constant=_float
        )
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
    if (problem := text_problem(value)) is not None:
        raise ValueError(f"'{key}' {problem}")
    return value


def text_problem(value: str) -> str | None:
    """Why ``value`` can be neither a prompt nor a caption; None if it can."""
    if len(value) > MAX_TEXT:
        return f"has {len(value):,} characters; at most {MAX_TEXT:,} are read"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "has half a surrogate pair, which is no text"
    return None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return row


def _int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"the number {digits[:20]}... has more than {MAX_DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {digits[:20]} is not finite")
    return value
