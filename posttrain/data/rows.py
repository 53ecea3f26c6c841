"""Reads the images and captions that a JSONL file lists, and finds the lines that cannot be used."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from posttrain.data.lines import Problem, json_object, lines, listing, string
from posttrain.data.settings import Images
from posttrain.errors import DataError

Bucket = tuple[int, int]
"""(width, height) in pixels."""

COLUMNS = {"md5": "caption_en", "image": "caption"}
"""For each of the two formats: the column that names the image -> the column of its caption."""

CAPTION_KEYS = ("long", "medium", "short", "text")
"""The keys of a caption that is a JSON object; the first one with text is used."""


@dataclass(frozen=True, slots=True)
class Record:
    """A usable row."""

    id: int
    """Number of the row among all rows of the file, usable or not, from 0."""
    path: Path
    caption: str
    bucket: Bucket | None
    """The row's own size, if it names one."""
    line: int
    """Line of the file, from 1."""


@dataclass(frozen=True)
class Table:
    """The rows of a file."""

    file: Path
    rows: int
    """Number of rows: len(records) + len(problems)."""
    records: list[Record]
    """The usable rows."""
    problems: list[Problem]
    """One for each row that cannot be used."""
    notes: list[str] = field(default_factory=list)
    """Remarks for the user that are no problems."""


def read_records(spec: Images) -> Table:
    """The rows of ``spec.images``. No image is opened.

    Raises DataError if the file or image_dir cannot be read, if no row is usable, or if the fraction of
    unusable rows exceeds ``spec.tolerance``.
    """
    if spec.image_dir is not None and not spec.image_dir.is_dir():
        raise DataError(f"{spec.image_dir}: image_dir is no folder; it must hold the images of {spec.images}")
    folder = spec.image_dir if spec.image_dir is not None else spec.images.parent
    records: list[Record] = []
    problems: list[Problem] = []
    column = None
    for index, (line, raw) in enumerate(lines(spec.images)):
        path = None
        try:
            row = json_object(raw)
            column = column or next((name for name in COLUMNS if name in row), None)
            path = _path(row, column, folder)
            record = Record(index, path, _caption(row, column), _bucket(row), line)
            _check_file(path)
        except ValueError as error:
            problems.append(Problem(line, path, str(error)))
        else:
            records.append(record)
    rows = len(records) + len(problems)
    stop_beyond_tolerance(spec, problems, rows)
    repeated = len(records) - len({record.path for record in records})
    notes = [f"{repeated} rows repeat an image; all are kept"] if repeated else []
    return Table(spec.images, rows, records, problems, notes)


def stop_beyond_tolerance(spec: Images, problems: Sequence[Problem], rows: int) -> None:
    """Raise DataError if all ``rows``, or a larger fraction than ``spec.tolerance``, have problems."""
    allowed = int(spec.tolerance * rows + 1e-9)  # 0.29 * 100 is below 29 in binary
    if len(problems) < rows and len(problems) <= allowed:
        return
    summary = f"{len(problems)} of {rows} rows cannot be used" if rows else "it has no rows"
    limit = f" (allowed: {allowed}, by tolerance {spec.tolerance:g})" if len(problems) > allowed else ""
    raise DataError(
        f"{spec.images}: {summary}{limit}{listing(spec.images, problems)}\n"
        "Repair or remove these rows"
        + (", or raise 'tolerance' to skip them." if len(problems) < rows else "; none is left to train on.")
    )


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
    return folder / name  # an absolute path ignores the folder


def _caption(row: dict[str, Any], column: str | None) -> str:
    key = COLUMNS[column or "md5"]
    value = row.get(key)
    if isinstance(value, str) and re.match(r"\s*\{\s*[\"'}]", value):
        # The text is meant as JSON, so it must not be trained on as a caption.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'{key}' starts like a JSON object but is none: {error}") from error
    if not isinstance(value, dict):
        return string(row, key)
    for name in CAPTION_KEYS:
        if isinstance(value.get(name), str) and value[name].strip():
            return string(value, name)
    raise ValueError(f"'{key}' is an object without text under any of {', '.join(CAPTION_KEYS)}")


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
