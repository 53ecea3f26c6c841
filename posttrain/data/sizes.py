"""Finds the sizes of images from their headers, and keeps them, so that no image is opened twice for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch.utils.data import Dataset

from posttrain.data.decode import BadImage, image_size
from posttrain.data.index import file_of, keep, kept
from posttrain.data.place import Place
from posttrain.data.settings import Images
from posttrain.data.table import Bucket, Record
from posttrain.data.workers import read
from posttrain.support.heartbeat import beat

FORMAT = 1
"""Version of the kept sizes; increase it when an equal file would have another size."""


def sizes_of(spec: Images, records: Sequence[Record]) -> list[Bucket | str]:
    """The (width, height) of each record's image in pixels, upright, or why it cannot be read.

    Sizes of large data sets are kept (:mod:`posttrain.data.index`) by the file's path, size and time of
    change, so an image that was replaced is opened again. ``spec.workers`` processes open the others.
    """
    file = file_of("sizes", spec.images.absolute(), FORMAT)
    known = kept(file, dict) if len(records) else {}
    keys = [_key(record.image) for record in records]
    found: dict[str, Bucket | str] = {
        key: size for key in keys if (size := _size(known.get(key))) is not None
    }
    new = [n for n, key in enumerate(keys) if key not in found]
    try:
        for n, size in zip(new, read(_Sizes(spec, records), new, spec.workers), strict=True):
            found[keys[n]] = size
            beat()
    finally:  # what was read before a signal, or before other processes gave up waiting, is not read again
        if new:
            keep(file, {key: size for key, size in found.items() if not isinstance(size, str)})
    # a kept size does not excuse an image that has more pixels than are allowed now
    return [_allowed(spec, found[key]) for key in keys]


class _Sizes(Dataset["Bucket | str"]):
    """Maps a record's position to the size of its image, or to the reason that it has none."""

    def __init__(self, spec: Images, records: Sequence[Record]) -> None:
        self.spec, self.records = spec, records

    def __getitem__(self, index: int) -> Bucket | str:
        try:
            return image_size(self.records[index].image, self.spec.max_pixels)
        except BadImage as error:
            return error.reason


def _key(image: Place) -> str:
    about = f"{image.path.absolute()}\0{image.start}\0{image.size}\0{image.mtime_ns}"
    return hashlib.blake2b(about.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _size(value: object) -> Bucket | None:
    """A kept size; None if it is damaged."""
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    return None


def _allowed(spec: Images, size: Bucket | str) -> Bucket | str:
    if not isinstance(size, str) and size[0] * size[1] > spec.max_pixels:
        return f"{size[0]} x {size[1]} pixels are more than max_pixels ({spec.max_pixels})"
    return size
