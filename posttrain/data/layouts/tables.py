"""Reads images with captions in ``.parquet`` files, and in data sets of the hub or of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.columns import bucket_of, caption_column, caption_of, extra_of, listed
from posttrain.data.layouts.arrow import entries, holds_bytes, loaded, loaded_parquet, plain
from posttrain.data.lines import Problem
from posttrain.data.settings import Images
from posttrain.data.table import Record
from posttrain.errors import DataError

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "file_name")
"""Columns in which the image is looked for, in this order."""


def read_parquet(spec: Images, files: Sequence[Path], notes: list[str]) -> Iterator[Record | Problem]:
    """The rows of the ``.parquet`` files. Raises DataError if they cannot be read."""
    dataset, changed = loaded_parquet(spec, files)
    folder = spec.images if spec.images.is_dir() else spec.images.parent
    yield from _rows(spec, dataset, spec.image_dir or folder, changed, notes)


def read_dataset(spec: Images, notes: list[str]) -> Iterator[Record | Problem]:
    """The rows of ``spec.split`` of a data set of the hub, or of a folder. Raises DataError if it cannot be
    read."""
    local = spec.images.exists()
    path = str(spec.images.absolute()) if local else spec.images.as_posix()
    dataset = loaded(spec, path, name=spec.subset, split=spec.split)
    folder = spec.image_dir or (spec.images if local else None)
    yield from _rows(spec, dataset, folder, None, notes)


def _rows(
    spec: Images, dataset: Any, folder: Path | None, changed: int | None, notes: list[str]
) -> Iterator[Record | Problem]:
    """The rows of ``dataset``. Paths of images start at ``folder``; ``changed`` is when its files were."""
    image, caption = _columns(spec, dataset.data.schema)
    for entry in entries(spec, dataset, [image], changed, notes):
        number = entry.number
        try:
            place = entry.place(image, folder)
            row = {name: plain(value) for name, value in entry.columns.items()}
            text, bucket, extra = caption_of(row, caption), bucket_of(row), extra_of(row, (caption,))
            yield Record(number - 1, place, text, bucket, number, spec.images, extra)
        except ValueError as error:
            yield Problem(number, None, str(error), spec.images)


def _columns(spec: Images, schema: Any) -> tuple[str, str]:
    """The columns of the image and of the caption. Raises DataError if there are none."""
    names = schema.names
    image = spec.image_column or next((name for name in IMAGE_COLUMNS if name in names), None)
    if image is None or image not in names:
        raise DataError(
            f"{spec.images}: no column of images, {listed([image] if image else IMAGE_COLUMNS)} (found: "
            f"{listed(names)}); name it by image_column"
        )
    kind = schema.field(image).type
    if not (holds_bytes(kind) or str(kind) in ("string", "large_string")):
        raise DataError(
            f"{spec.images}: the column {image!r} holds {kind}, neither bytes of images nor paths"
        )
    try:
        return image, caption_column([name for name in names if name != image], spec.caption_column)
    except ValueError as error:
        raise DataError(f"{spec.images}: {error}") from error
