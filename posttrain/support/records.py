"""Reads the JSON files that a run or an evaluation wrote. A damaged file is an error that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.errors import DamagedError


def read_object(file: Path, *keys: str) -> dict[str, Any]:
    """The JSON object in ``file``, which must have ``keys``. Raises DamagedError."""
    return json_object(read_text(file), str(file), *keys)


def read_rows(file: Path, *keys: str) -> list[dict[str, Any]]:
    """The JSON objects in ``file``, one a line; each must have ``keys``. Raises DamagedError."""
    lines = read_text(file).splitlines()
    return [json_object(line, f"{file}:{i}", *keys) for i, line in enumerate(lines, 1)]


def read_text(file: Path) -> str:
    """The UTF-8 text of ``file``. Raises DamagedError, also where there is no file."""
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(f"{str(file)!r} is damaged: byte {error.start} is no text") from error
    except OSError as error:
        raise DamagedError(f"cannot read {str(file)!r}: {error.strerror}") from error


def json_object(text: str | bytes, place: str, *keys: str) -> dict[str, Any]:
    """The JSON object in ``text``, found at ``place``, which must have ``keys``. Raises DamagedError."""
    if not text.strip():
        raise DamagedError(f"{place!r} is damaged: it is empty")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{place!r} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{place!r} is damaged: it is no JSON object")
    if missing := [key for key in keys if key not in content]:
        raise DamagedError(f"{place!r} is damaged: it has no {', '.join(map(repr, missing))}")
    return content
