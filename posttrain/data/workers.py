"""What worker processes do with one image: decode it, and crop it or report why it cannot be read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from posttrain.data.buckets import cover_and_crop
from posttrain.data.decode import BadImage, open_image
from posttrain.data.lines import Problem
from posttrain.data.settings import Images
from posttrain.data.table import Bucket, Record
from posttrain.support.randomness import generator
from posttrain.support.stopping import ignored

CENTRE = (0.5, 0.5)
"""Offsets of the central crop; see :func:`posttrain.data.buckets.cover_and_crop`."""


def read(dataset: Dataset[Any], jobs: Iterable[Any], workers: int) -> DataLoader[Any]:
    """Yield ``dataset[job]`` for each job, in order, computed ahead by ``workers`` processes (0: none)."""
    return DataLoader(
        dataset,
        sampler=jobs,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=ignored,
        generator=torch.Generator(),  # by default each start would draw from the global generator
    )


def _unchanged(item: Any) -> Any:
    return item


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of an image that was decoded."""

    sha256: str
    """A hash of its bytes."""
    size: Bucket
    """Its (width, height) in pixels, upright."""


class DecodeCheck(Dataset["Problem | Seen | None"]):
    """Maps an image's id to the reason that it cannot be decoded, or else to None; ``seen``: to what is known
    of it."""

    def __init__(self, spec: Images, records: dict[int, Record], *, seen: bool = False):
        self.spec, self.records, self.seen = spec, records, seen

    def __getitem__(self, index: int) -> Problem | Seen | None:
        record = self.records[index]
        try:
            image = open_image(record.image, self.spec.max_pixels)
        except BadImage as error:
            return record.problem(error.reason)
        try:
            return Seen(record.image.sha256(), image.size) if self.seen else None
        except OSError as error:
            return record.problem((error.strerror or str(error)).lower())


class EpochCrops(Dataset[NDArray[np.uint8] | Problem]):
    """Maps (epoch, id) to the crop of that epoch, (h, w, 3) uint8, or to the reason that there is none.

    Crops are arrays because tensors would travel in shared memory, which is small in containers.
    """

    def __init__(
        self, spec: Images, records: dict[int, Record], bucket_of: dict[int, Bucket], key: tuple[object, ...]
    ):
        self.spec, self.records, self.bucket_of, self.key = spec, records, bucket_of, key

    def __getitem__(self, index: tuple[int, int]) -> NDArray[np.uint8] | Problem:
        epoch, i = index
        offsets = CENTRE
        if self.spec.crop == "random":
            across, down = torch.rand(2, generator=generator(*self.key, epoch, "crop", i)).tolist()
            offsets = (across, down)
        flip = flipped(self.spec, self.key, epoch, i)
        return _crop(self.spec, self.records[i], self.bucket_of[i], offsets, flip)


class CentreCrops(Dataset[NDArray[np.uint8] | Problem]):
    """Maps (id, whether to mirror) to the central crop, in the form of :class:`EpochCrops`."""

    def __init__(self, spec: Images, records: dict[int, Record], bucket_of: dict[int, Bucket]):
        self.spec, self.records, self.bucket_of = spec, records, bucket_of

    def __getitem__(self, index: tuple[int, bool]) -> NDArray[np.uint8] | Problem:
        i, flip = index
        return _crop(self.spec, self.records[i], self.bucket_of[i], CENTRE, flip)


def flipped(spec: Images, key: tuple[object, ...], epoch: int, i: int) -> bool:
    """Whether image ``i`` is mirrored in ``epoch``."""
    return spec.flip and torch.rand((), generator=generator(*key, epoch, "flip", i)).item() < 0.5


def _crop(
    spec: Images, record: Record, bucket: Bucket, offsets: tuple[float, float], flip: bool
) -> NDArray[np.uint8] | Problem:
    try:
        image = open_image(record.image, spec.max_pixels)
    except BadImage as error:
        return record.problem(error.reason)
    return cover_and_crop(image, bucket, offsets, flip)
