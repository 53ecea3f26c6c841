"""Which images and captions does a JSONL file list, and which of its lines cannot be used?"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from posttrain.data.spec import Images
from posttrain.errors import DataError

Bucket = tuple[int, int]
"""(width, height) in pixels."""

COLUMNS = {"md5": "caption_en", "image": "caption"}
"""The column that names the image -> the column of its caption, for each format."""

LENGTHS = ("long", "medium", "short", "text")
LISTED = 10


@dataclass(frozen=True, slots=True)
class Record:
    """A usable row. ``id`` counts all rows of the file from 0, so it does not depend on which are usable."""

    id: int
    path: Path
    caption: str
    bucket: Bucket | None
    line: int


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the row at ``line`` (from 1) cannot be used; ``path`` is its image where that is known."""

    line: int
    path: Path | None
    reason: str


@dataclass(frozen=True)
class Table:
    """What a file lists: ``rows`` = len(records) + len(problems); ``notes`` are worth telling, no faults."""

    file: Path
    rows: int
    records: list[Record]
    problems: list[Problem]
    notes: list[str] = field(default_factory=list)


def read_records(spec: Images) -> Table:
    """The rows of ``spec.images``, without opening an image.

    Raises DataError if the file or image_dir cannot be read, if no row is usable, or if more than
    ``spec.tolerance`` of the rows are not.
    """
    folder = spec.image_dir if spec.image_dir is not None else spec.images.parent
    records: list[Record] = []
    problems: list[Problem] = []
    column, rows = None, 0
    for line, raw in lines(spec.images):
        path = None
        try:
            row = json_object(raw)
            column = column or next((name for name in COLUMNS if name in row), None)
            path = _path(row, column, folder)
            records.append(Record(rows, path, _caption(row, column), _bucket(row), line))
            _check_file(path)
        except ValueError as error:
            if records and records[-1].line == line:
                records.pop()
            problems.append(Problem(line, path, str(error)))
        rows += 1
    if not folder.is_dir():
        raise DataError(f"{folder}: image_dir is no folder; it must hold the images of {spec.images}")
    stop_beyond_tolerance(spec, problems, rows)
    if repeated := len(records) - len({record.path for record in records}):
        return Table(spec.images, rows, records, problems, [f"{repeated} rows repeat an image; all are kept"])
    return Table(spec.images, rows, records, problems)


def stop_beyond_tolerance(spec: Images, problems: Sequence[Problem], rows: int) -> None:
    """Raises DataError if no row is left or if more than ``spec.tolerance`` of ``rows`` have problems."""
    allowed = int(spec.tolerance * rows + 1e-9)  # 0.29 * 100 is below 29 in binary
    if len(problems) < rows and len(problems) <= allowed:
        return
    found = f"{len(problems)} of {rows} rows cannot be used" if rows else "it has no rows"
    limit = f" (allowed: {allowed}, by tolerance {spec.tolerance:g})" if len(problems) > allowed else ""
    raise DataError(
        f"{spec.images}: {found}{limit}{listing(spec.images, problems)}\n"
        "Repair or remove these rows"
        + (", or raise 'tolerance' to skip them." if len(problems) < rows else "; none is left to train on.")
    )


def listing(file: Path, problems: Sequence[Problem]) -> str:
    """The first ten of ``problems``, each on a line ``file:line: reason``, and how many more there are."""
    shown = [
        f"\n  {file}:{p.line}: {p.reason}" + (f" ({p.path})" if p.path else "") for p in problems[:LISTED]
    ]
    more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "".join(shown) + more


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, stripped bytes) of each line that is not blank, without a byte order mark.

    Raises DataError if ``file`` is missing, a folder, unreadable or no UTF-8 text.
    """
    try:
        with file.open("rb") as handle:
            head = handle.read(4096)
            if b"\0" in head:
                raise DataError(f"{file}: not a text file; it must be UTF-8 text, one row a line")
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
    """The JSON object on one line. Raises ValueError if there is none."""
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
    """The non-empty, stripped string at ``key``. Raises ValueError if it is missing or something else."""
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


def _path(row: dict[str, Any], column: str | None, folder: Path) -> Path:
    if column is None:
        raise ValueError(f"neither 'md5' nor 'image' (found: {', '.join(map(repr, row)) or 'nothing'})")
    if mixed := [name for name in COLUMNS if name in row and name != column]:
        raise ValueError(f"'{mixed[0]}' in a file whose rows name their images by '{column}'")
    name = string(row, column)
    if column == "md5":
        if re.search(r"[/\\\0]", name):
            raise ValueError(f"'md5' must be a file name without its '.jpg', not {name!r}")
        return folder / f"{name}.jpg"
    if "\0" in name or ".." in PurePath(name).parts:
        raise ValueError(f"'image' must not leave the folder of the images: {name!r}")
    return folder / name  # an absolute path stays as it is


def _caption(row: dict[str, Any], column: str | None) -> str:
    key = COLUMNS[column or "md5"]
    value = row.get(key)
    if isinstance(value, str) and re.match(r"\s*\{\s*[\"'}]", value):
        # Meant as JSON, so it is never trained on as text.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'{key}' starts like a JSON object but is none: {error}") from error
    if not isinstance(value, dict):
        return string(row, key)
    for length in LENGTHS:
        if isinstance(value.get(length), str) and value[length].strip():
            return string(value, length)
    raise ValueError(f"'{key}' is an object without text under any of {', '.join(LENGTHS)}")


def _bucket(row: dict[str, Any]) -> Bucket | None:
    if row.get("bw") is None and row.get("bh") is None:
        return None
    for key in ("bw", "bh"):
        if type(row.get(key)) is not int or row[key] <= 0:
            raise ValueError(f"'{key}' must be a positive whole number, not {json.dumps(row.get(key))[:60]}")
    return row["bw"], row["bh"]


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except OSError as error:
        raise ValueError((error.strerror or str(error)).lower()) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    if not status.st_size:
        raise ValueError("the file has zero bytes")
