"""Reads the rows of image data: finds out how the images lie, and calls the reader of that layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain.data.layouts import captions, lists, shards, tables
from posttrain.data.settings import Images
from posttrain.data.table import Table, table_of
from posttrain.errors import DataError
from posttrain.support.paths import is_folder
from posttrain.support.wording import counted

LISTS = ("metadata.jsonl", "metadata.csv")
"""Names of lists in folders of images, by the hub's convention."""
PACKED = (".parquet", ".tar")
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")


def read_records(spec: Images) -> Table:
    """The rows of ``spec.images``. No image is opened.

    Raises DataError if something cannot be read, if no row is usable, or if the fraction of unusable rows
    exceeds ``spec.tolerance``.
    """
    if spec.image_dir is not None and not is_folder(spec.image_dir):
        raise DataError(f"{spec.image_dir}: image_dir is no folder; it must hold the images of {spec.images}")
    notes: list[str] = []
    if spec.split is not None:
        layout = f"split {spec.split!r} of a data set"
        return table_of(spec, layout, tables.read_dataset(spec, notes), notes)
    if is_folder(spec.images):
        return _of_folder(spec, notes)
    return _of_files(spec, spec.images.suffix.lower(), [spec.images], notes)


def _of_folder(spec: Images, notes: list[str]) -> Table:
    files = captions.files_in(spec.images, notes)
    found = {name: [f for f in files if f.name.lower() == name] for name in LISTS}
    found |= {ending: [f for f in files if f.suffix.lower() == ending] for ending in PACKED}
    found = {kind: of_kind for kind, of_kind in found.items() if of_kind}
    if len(found) > 1:
        kinds = " and ".join(f"{counted(len(of_kind), kind)}" for kind, of_kind in found.items())
        raise DataError(f"{spec.images}: the folder has {kinds}: name the file or subfolder that is meant")
    if not found:
        layout = "a folder of images with .txt files"
        return table_of(spec, layout, captions.read(spec, files, notes), notes)
    ((kind, of_kind),) = found.items()
    table = _of_files(spec, kind if kind in PACKED else Path(kind).suffix, sorted(of_kind), notes)
    listed = {record.path for record in table.records} | {problem.path for problem in table.problems}
    images = [f for f in files if f.suffix.lower() in captions.ENDINGS]
    if alone := sum(f not in listed for f in images):
        table.notes.append(f"{counted(alone, 'image')} of the folder without a row")
    return table


def _of_files(spec: Images, ending: str, files: Sequence[Path], notes: list[str]) -> Table:
    many = counted(len(files), f"{ending or 'list'} file")
    if ending == ".parquet":
        return table_of(spec, many, tables.read_parquet(spec, files, notes), notes)
    if ending == ".tar":
        return table_of(spec, many, shards.read(spec, files, notes), notes)
    if spec.images.name.lower().endswith(COMPRESSED):
        raise DataError(
            f"{spec.images}: images in a compressed archive cannot be read where they lie: unpack it"
        )
    listed = files[0] if len(files) == 1 else None
    return table_of(spec, many, lists.read(spec, files), notes, listed)
