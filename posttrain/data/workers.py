"""What worker processes do with one image: decode it, and crop it or report why it cannot be read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from posttrain.data.buckets import cover_and_crop
from posttrain.data.decode import BadImage, open_image
from posttrain.data.lines import Problem
from posttrain.data.rows import Bucket, Record
from posttrain.data.settings import Images
from posttrain.support.randomness import generator

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
        generator=torch.Generator(),  # by default each start would draw from the global generator
    )


def _unchanged(item: Any) -> Any:
    return item


class DecodeCheck(Dataset[Problem | None]):
    """Maps an image's id to the reason that it cannot be decoded, or None."""

    def __init__(self, spec: Images, records: dict[int, Record]):
        self.spec, self.records = spec, records

    def __getitem__(self, index: int) -> Problem | None:
        record = self.records[index]
        try:
            open_image(record.path, self.spec.max_pixels)
        except BadImage as error:
            return Problem(record.line, record.path, error.reason)
        return None


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
        image = open_image(record.path, spec.max_pixels)
    except BadImage as error:
        return Problem(record.line, record.path, error.reason)
    return cover_and_crop(image, bucket, offsets, flip)
