"""Reads preference pairs in ``.parquet`` files, as Pick-a-Pic v2 has them, where their bytes lie.

A row has ``caption``, two images as files in ``jpg_0`` and ``jpg_1``, and ``label_0`` and ``label_1``: 1 for
the preferred image, 0 for the other, 0.5 and 0.5 for a tie (Kirstain et al. 2023, arXiv:2305.01569).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.columns import bucket_of, extra_of
from posttrain.data.layouts.arrow import Entry, entries, holds_bytes, loaded_parquet, plain
from posttrain.data.layouts.captions import files_in
from posttrain.data.lines import Problem, string
from posttrain.data.settings import Images
from posttrain.data.table import Record
from posttrain.errors import DataError
from posttrain.support.paths import is_folder
from posttrain.support.wording import counted

CAPTION, IMAGES, LABELS = "caption", ("jpg_0", "jpg_1"), ("label_0", "label_1")
COLUMNS = (CAPTION, *IMAGES, *LABELS)
SUFFIX = ".parquet"


def parquet_files(path: Path) -> list[Path]:
    """The parquet files that ``path`` is, or that the folder and its subfolders hold, sorted; or none."""
    if not is_folder(path):
        return [path] if path.suffix.lower() == SUFFIX else []
    return sorted(file for file in files_in(path, []) if file.suffix.lower() == SUFFIX)


def rows_in(files: Sequence[Path]) -> int:
    """How many rows there are, ties included. Raises DataError if a file cannot be read, or has another
    layout."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = "reading parquet needs pyarrow, which is missing: pip install 'posttrain[data]'"
        raise DataError(f"{files[0]}: {message}") from error
    total = 0
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                _check_columns(file, opened.schema_arrow)
                total += opened.metadata.num_rows
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{file}: not a parquet file that can be read: {error}") from error
    return total


def read(spec: Images, files: Sequence[Path], notes: list[str]) -> Iterator[tuple[Record, Record] | Problem]:
    """The chosen and the rejected image of each row of ``files`` that has a preference; no image is opened.

    Adds to ``notes`` how many rows have none, and are left out. Raises DataError if a file cannot be read, or
    is in another layout.
    """
    rows_in(files)  # names the file that is damaged or in another layout
    dataset, changed = loaded_parquet(spec, files)
    folder = spec.image_dir or (spec.images if is_folder(spec.images) else spec.images.parent)
    ties = 0
    for entry in entries(spec, dataset, IMAGES, changed, notes):
        first, second = (entry.columns[label] for label in LABELS)
        if first is None or second is None or not (first > second or second > first):
            ties += 1
            continue
        sides = IMAGES if first > second else IMAGES[::-1]
        try:
            yield _pair(spec, entry, sides, folder, entry.number - 1 - ties)
        except ValueError as error:
            yield Problem(entry.number, None, str(error), spec.images)
    if ties:
        notes.append(f"left out, without a preference: {counted(ties, 'row')}")


def _pair(
    spec: Images, entry: Entry, sides: tuple[str, ...], folder: Path, number: int
) -> tuple[Record, Record]:
    """The records of the images in the columns ``sides``. Raises ValueError if one cannot be used."""
    row = {name: plain(value) for name, value in entry.columns.items()}
    caption, bucket, extra = string(row, CAPTION), bucket_of(row), extra_of(row, COLUMNS)
    chosen, rejected = (
        Record(number, entry.place(side, folder), caption, bucket, entry.number, spec.images, extra)
        for side in sides
    )
    return chosen, rejected


def _check_columns(file: Path, schema: Any) -> None:
    """Raise DataError if a table lacks a column, or holds no images in those of images."""
    if missing := [name for name in COLUMNS if name not in schema.names]:
        raise DataError(
            f"{file}: no column {', '.join(map(repr, missing))}; it has {', '.join(schema.names)}"
        )
    for name in IMAGES:
        kind = schema.field(name).type
        if not (holds_bytes(kind) or str(kind) in ("string", "large_string")):
            raise DataError(f"{file}: the column {name!r} holds {kind}, neither bytes of images nor paths")
