"""Reads images that a list names: a ``.jsonl`` file, or a ``.csv`` file whose first line names the columns.

``metadata.jsonl`` and ``metadata.csv`` in a folder of images are the hub's convention (``file_name``).
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from posttrain.data.columns import CAPTIONS, bucket_of, caption_of, extra_of, listed
from posttrain.data.lines import MAX_LINE, Problem, json_object, lines, string
from posttrain.data.place import Place
from posttrain.data.settings import Images
from posttrain.data.table import Record
from posttrain.errors import DataError

FORMATS = {"md5": "caption_en", "image": "caption", "file_name": None}
"""Column that names the image -> column of its caption; None if it is looked for."""
NUMBERS = ("bw", "bh")

Row = tuple[int, dict[str, Any] | ValueError]
"""Number of a line, and its columns or why they cannot be read."""


def read(spec: Images, files: Sequence[Path]) -> Iterator[Record | Problem]:
    """The rows of the lists ``files``. No image is opened. Raises DataError if a list cannot be read."""
    numbers = count()
    for file in files:
        folder = spec.image_dir if spec.image_dir is not None else file.parent
        yield from _rows_of(spec, file, folder, numbers)


def _rows_of(spec: Images, file: Path, folder: Path, numbers: Iterator[int]) -> Iterator[Record | Problem]:
    column = spec.image_column
    caption = spec.caption_column
    for line, row in _csv(file, column) if file.suffix.lower() == ".csv" else json_rows(file):
        path, number = None, next(numbers)
        try:
            if isinstance(row, ValueError):
                raise row
            column = column or next((name for name in FORMATS if name in row), None)
            path = _path(row, column, folder, given=spec.image_column is not None)
            caption = caption or _caption_column(row, column)
            text, bucket = caption_of(row, caption), bucket_of(row)
            extra = extra_of(row, (column or "", caption))
            yield Record(number, Place.of_file(path), text, bucket, line, file, extra)
        except ValueError as error:
            yield Problem(line, path, str(error), file)


def json_rows(file: Path) -> Iterator[Row]:
    """The rows of a JSONL file. Raises DataError if it cannot be read."""
    for line, raw in lines(file):
        try:
            yield line, json_object(raw)
        except ValueError as error:
            yield line, error


def _csv(file: Path, column: str | None) -> Iterator[Row]:
    next(lines(file), None)  # refuses what is missing or binary
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        reader = csv.reader(handle)
        names = _names(file, reader, column)
        while True:
            line = reader.line_num + 1
            try:
                if (cells := next(reader, None)) is None:
                    return
            except csv.Error as error:
                yield line, ValueError(f"broken CSV: {error}")
                continue
            if cells:
                yield line, _cells(names, cells)


def _names(file: Path, reader: Iterator[list[str]], column: str | None) -> list[str]:
    """The first line of a CSV file. Raises DataError if it does not name the columns, ``column`` or one of
    FORMATS among them."""
    expected = [column] if column is not None else [*FORMATS]
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{file}:1: broken CSV: {error}") from error
    if len(set(names)) < len(names) or not set(expected) & set(names):
        raise DataError(
            f"{file}:1: the first line must name the columns, each once, one of them "
            f"{' or '.join(map(repr, expected))} (found: {listed(names[:10])})"
        )
    return names


def _cells(names: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | ValueError:
    """The columns of a line of CSV. An empty cell is no column."""
    if len(cells) != len(names):
        return ValueError(f"{len(cells)} cells, but the first line names {len(names)} columns")
    row: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
    for name, cell in row.items():
        if len(cell) > MAX_LINE:
            return ValueError(f"'{name}' has more than {MAX_LINE:,} characters")
        if any("\udc80" <= character <= "\udcff" for character in cell):
            return ValueError(f"'{name}' is not UTF-8")
        if name in NUMBERS and re.fullmatch(r"\d{1,18}", cell, re.ASCII):
            row[name] = int(cell)
        if name == "weight":
            with contextlib.suppress(ValueError):  # text is refused with all other wrong weights
                row[name] = float(cell)
    return row


def _path(row: dict[str, Any], column: str | None, folder: Path, *, given: bool) -> Path:
    if column is None:
        raise ValueError(f"none of {listed(FORMATS)} names an image (found: {listed(row)})")
    if not given and (mixed := [name for name in ("md5", "image") if name in row and name != column]):
        raise ValueError(f"'{mixed[0]}' in a file whose rows name their images by '{column}'")
    name = string(row, column)
    if column == "md5" and not given:
        if re.search(r"[/\\\0]", name):
            raise ValueError(f"'md5' must be a file name without its '.jpg', not {name!r}")
        return folder / f"{name}.jpg"
    if leaves(name) or (column == "file_name" and is_absolute(name)):
        raise ValueError(f"'{column}' must not leave the folder of the images: {name!r}")
    return folder / name  # an absolute path ignores the folder


def _caption_column(row: dict[str, Any], column: str | None) -> str:
    """The column of captions, for a file whose rows name their images by ``column``."""
    names = ("text", *CAPTIONS)
    return FORMATS.get(column or "") or next((name for name in names if name in row), names[0])


def leaves(name: str) -> bool:
    """Whether a relative path leads out of its folder, or is none."""
    return "\0" in name or ".." in PurePath(name).parts or ".." in PureWindowsPath(name).parts


def is_absolute(name: str) -> bool:
    """Whether a path is absolute, on any system."""
    return PurePath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
