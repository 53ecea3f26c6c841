"""Finds where images lie in the tables that the library ``datasets`` reads: parquet files, sets of the hub.

``datasets`` writes what it reads into Arrow files in its own cache, once. In these the bytes of an image lie
in one piece, so images are read where they lie, in any order, by any process.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.columns import listed
from posttrain.data.layouts.lists import is_absolute, leaves
from posttrain.data.place import Place
from posttrain.data.settings import Images
from posttrain.errors import DataError

Part = tuple[int | None, int, str | None]
"""Where an image begins in the Arrow file, its bytes, and its name. None: the name is a path."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of a table."""

    number: int
    """Number of the row, from 1."""
    file: Path
    """The Arrow file."""
    mtime_ns: int
    """When the table was changed, in nanoseconds since 1970."""
    images: dict[str, Part]
    """Column -> where its image lies."""
    columns: dict[str, Any]
    """The other columns."""

    def place(self, column: str, folder: Path | None) -> Place:
        """Where the bytes of the image in ``column`` are. Paths of images start at ``folder``.

        Raises ValueError if there are none, or if its path leaves the folder.
        """
        start, size, path = self.images[column]
        if start is not None:
            several = f" {column}" if len(self.images) > 1 else ""
            name = f"row {self.number}{several}" + (f" ({path})" if path else "")
            return Place.of_part(self.file, self.mtime_ns, name, start, size)
        if path is None:
            raise ValueError("no image: neither bytes nor a path")
        if (
            folder is None
            or leaves(path)
            or (is_absolute(path) and not Path(path).is_relative_to(folder.absolute()))
        ):
            raise ValueError(f"the image's path must not leave the folder of the images: {path[:200]!r}")
        return Place.of_file(folder / path)


def loaded_parquet(spec: Images, files: Sequence[Path]) -> tuple[Any, int]:
    """The data set of the ``.parquet`` files, and when they were changed. Raises DataError if they cannot be
    read."""
    files = sorted((file.absolute() for file in files), key=lambda f: f.as_posix())
    try:
        changed = max(file.stat().st_mtime_ns for file in files)
    except OSError as error:
        raise DataError(f"{spec.images}: {(error.strerror or str(error)).lower()}") from error
    return loaded(spec, "parquet", data_files=[str(file) for file in files], split="train"), changed


def loaded(spec: Images, *given: Any, **options: Any) -> Any:
    """The data set. Raises DataError, with the library's own reason."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{spec.images}: needs the library datasets, which is missing: pip install 'posttrain[data]'"
        ) from error
    try:
        with _quiet(datasets):
            return datasets.load_dataset(*given, **options)
    except Exception as error:  # the library raises errors of many kinds
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:400]
        raise DataError(f"{spec.images}: the library datasets cannot read it ({reason})") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Silence the library's remarks, and its progress bars where no person sees them; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def entries(
    spec: Images, dataset: Any, images: Sequence[str], changed: int | None, notes: list[str]
) -> Iterator[Entry]:
    """The rows of ``dataset``, whose columns ``images`` hold images. ``changed`` is when its files were.

    Adds to ``notes`` which columns are left out. Raises DataError if not all rows are in its files.
    """
    binary = [f.name for f in dataset.data.schema if f.name not in images and holds_bytes(f.type)]
    if binary:
        notes.append(f"columns of bytes are left out: {listed(binary)}")
    number = 0
    for file in (Path(entry["filename"]) for entry in dataset.cache_files):
        mtime_ns = changed if changed is not None else file.stat().st_mtime_ns
        for parts, row in _in_file(spec, file, images, binary):
            number += 1
            yield Entry(number, file, mtime_ns, dict(zip(images, parts, strict=True)), row)
    if number != len(dataset):
        raise DataError(
            f"{spec.images}: {number} of {len(dataset)} rows are in the files of the library datasets"
        )


def _in_file(
    spec: Images, file: Path, images: Sequence[str], left_out: Sequence[str]
) -> Iterator[tuple[tuple[Part, ...], dict[str, Any]]]:
    """Where each row's images lie in an Arrow file, and its other columns."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        base, size = mapped.read_buffer().address, mapped.size()
        mapped.seek(0)
        for batch in pa.ipc.open_stream(mapped):
            parts = [_parts(batch.column(image), base) for image in images]
            if any(p[0] is not None and not 0 <= p[0] <= size - p[1] for column in parts for p in column):
                raise DataError(f"{spec.images}: its images lie in {str(file)!r} otherwise than expected")
            rest = batch.drop_columns([*images, *left_out]).to_pylist()
            yield from zip(zip(*parts, strict=True), rest, strict=True)


def holds_bytes(kind: Any) -> bool:
    """Whether a column of that Arrow type holds bytes, or the pairs of bytes and path of an image."""
    if str(kind).startswith("struct"):
        return {field.name for field in kind} == {"bytes", "path"} and holds_bytes(kind.field("bytes").type)
    return str(kind) in ("binary", "large_binary")


def _parts(column: Any, base: int) -> list[Part]:
    """Where the images of an Arrow array lie, in bytes from the address ``base``."""
    paths: list[str | None] = [None] * len(column)
    content = column
    if str(column.type).startswith("struct"):
        content, paths = column.field("bytes"), column.field("path").to_pylist()
    elif "string" in str(column.type):
        return [(None, 0, path) for path in column.to_pylist()]
    _, offsets, data = content.buffers()
    wide = np.int64 if str(content.type) == "large_binary" else np.int32
    ends = np.frombuffer(offsets, wide)[content.offset : content.offset + len(content) + 1].tolist()
    start = data.address - base if data is not None else 0
    return [
        (None if missing else start + first, last - first, path)
        for first, last, path, missing in zip(
            ends, ends[1:], paths, content.is_null().to_pylist(), strict=False
        )
    ]


def plain(value: Any) -> Any:
    """A value of a table as a JSON value. Raises ValueError for an infinite number."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and math.isinf(value):
        raise ValueError(f"the number {value} is not finite")
    if isinstance(value, float) and math.isnan(value):
        return None  # pandas writes a missing number as NaN
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat() if isinstance(value, datetime | date | time) else str(value)
