"""Loads the batches of images that each training step sees.

Every random draw is a function of (key, epoch, image): worker processes and prefetching change speed only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.data.assignment import assigned
from posttrain.data.buckets import to_pixels
from posttrain.data.lines import Problem, listing, one_for_each_row
from posttrain.data.order import batches, batches_per_epoch, rank_slice
from posttrain.data.rows import read_records
from posttrain.data.settings import Images
from posttrain.data.table import Bucket, Record, Table, stop_beyond_tolerance
from posttrain.data.workers import CentreCrops, DecodeCheck, EpochCrops, Seen, flipped, read
from posttrain.errors import DataError
from posttrain.support.randomness import generator

TRIAL_IMAGES = 64
"""Images decoded before a run starts, so that a folder of damaged images stops it at once."""


@dataclass
class ImageBatch:
    """The n images of one rank at one step. All lists have n entries."""

    step: int
    """Step of the data order, from 0. A resumed run starts at the step after its last one."""
    epoch: int
    ids: list[int]
    pixels: Tensor
    """(n, 3, h, w) float32 in [-1, 1], on the CPU."""
    captions: list[str]
    sample_index: list[int]
    """Each image's position in the batch of all ranks, from 0; unusable images keep their position."""
    bucket: Bucket
    """(w, h) in pixels."""

    def take(self, positions: Sequence[int]) -> ImageBatch:
        """The batch of the images at ``positions`` (from 0) alone."""
        lists = _lists_at(self, positions, "ids", "captions", "sample_index")
        return replace(self, pixels=self.pixels[list(positions)], **lists)


@dataclass(frozen=True)
class PlannedBatch:
    """The n images that one rank is to load at one step. All lists have n entries."""

    step: int
    ids: list[int]
    flips: list[bool]
    """Whether each image is mirrored."""
    captions: list[str]
    sample_index: list[int]
    """Each image's position in the batch of all ranks, from 0."""

    def take(self, positions: Sequence[int]) -> PlannedBatch:
        """The batch of the images at ``positions`` (from 0) alone."""
        return replace(self, **_lists_at(self, positions, "ids", "flips", "captions", "sample_index"))


class ImageSource:
    """The images of ``spec``, each assigned to a bucket whose sides are multiples of ``divisor``.

    With a ``table`` its rows are taken, and ``spec`` says how to read their images.

    ``records`` maps an image's id to its row, ``buckets`` a bucket to its ids, ``bucket_of`` an id to its
    bucket. ``skipped`` lists each unusable row known so far once; of undecodable images a rank knows those
    that it has met itself, and those that :meth:`skip` told it. ``files`` tells whether the images are still
    the same; it, ``layout`` and ``listed`` are those of :class:`posttrain.data.table.Table`. ``notes`` are
    remarks for the user. Raises DataError if the files of ``spec`` cannot be read or if more rows are
    unusable than it tolerates.
    """

    def __init__(self, spec: Images, divisor: int, table: Table | None = None):
        table = table or read_records(spec)
        self.spec, self.rows, self.notes, self.files = spec, table.rows, table.notes, table.files
        self.layout, self.listed = table.layout, table.listed
        self.skipped: list[Problem] = list(table.problems)
        self.records: dict[int, Record] = {}
        self.buckets: dict[Bucket, list[int]] = {}
        for record, bucket in zip(table.records, assigned(table, spec, divisor), strict=True):
            if isinstance(bucket, str):
                self.skipped.append(record.problem(bucket))
                continue
            self.records[record.id] = record
            self.buckets.setdefault(bucket, []).append(record.id)
        stop_beyond_tolerance(spec, self.skipped, self.rows)
        self.bucket_of = {i: bucket for bucket, ids in self.buckets.items() for i in ids}
        self._try_some_images()

    def batches_per_epoch(self, batch_size: int) -> int:
        """The number of steps in which every image is seen once, if every image can be decoded."""
        return batches_per_epoch(self.buckets, batch_size)

    def batches(
        self,
        batch_size: int,
        key: tuple[object, ...],
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[ImageBatch]:
        """Yield the batches of ``rank`` from ``start_step`` on, without end; ``batch_size`` counts all ranks.

        An image that cannot be decoded is left out and noted in ``skipped``. On one rank, a batch without any
        usable image is not yielded, so its step number is missing. On several ranks every batch is yielded,
        if need be with n = 0, so that all ranks stay at one step. Raises DataError when more rows are skipped
        than tolerated, and ValueError if an argument is out of range.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, not {rank}")

        plan = functools.partial(self._plan, batch_size, key, start_step)
        jobs = ((epoch, i) for epoch, _, _, ids in plan() for i in rank_slice(ids, rank, world_size))
        if rank >= min(batch_size, max(map(len, self.buckets.values()))):
            jobs = iter(())  # every slice of this rank is empty, and the search for a job would not end
        dataset = EpochCrops(self.spec, self.records, self.bucket_of, key)
        crops = iter(read(dataset, jobs, self.spec.workers))
        for epoch, step, bucket, ids in plan():
            # The ids come first in zip: when they end, no crop of the next batch has been taken.
            usable = dict(self._usable(zip(rank_slice(ids, rank, world_size), crops, strict=False)))
            if usable or world_size > 1:
                yield self._batch(epoch, step, bucket, usable, ids)

    def planned_batches(
        self,
        batch_size: int,
        key: tuple[object, ...],
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[PlannedBatch]:
        """Yield what :meth:`batches` would load. No image is opened, so undecodable ones are included."""
        for epoch, step, _, all_ids in self._plan(batch_size, key, start_step):
            ids = rank_slice(all_ids, rank, world_size)
            flips = [flipped(self.spec, key, epoch, i) for i in ids]
            sample_index = rank_slice(range(len(all_ids)), rank, world_size)
            yield PlannedBatch(step, ids, flips, [self.records[i].caption for i in ids], sample_index)

    def centre_crops(
        self, jobs: Sequence[tuple[int, bool]], workers: int | None = None
    ) -> Iterator[tuple[int, bool, Tensor | None]]:
        """Yield (id, mirrored, pixels) for each (id, mirrored) of ``jobs``, cropped at the image's centre.

        The pixels are (3, h, w) in [-1, 1], or None for an image that cannot be decoded, which is noted in
        ``skipped``. ``workers`` processes decode, by default as many as the data's settings say. Raises
        DataError when more rows are skipped than tolerated.
        """
        dataset = CentreCrops(self.spec, self.records, self.bucket_of)
        images = read(dataset, jobs, self.spec.workers if workers is None else workers)
        for (i, flip), image in zip(jobs, images, strict=True):
            if isinstance(image, Problem):
                self.skip(image)
                yield i, flip, None
            else:
                yield i, flip, to_pixels(image[None])[0]

    def skip(self, problem: Problem) -> None:
        """Note in ``skipped`` that a row cannot be used. Raises DataError if more are than tolerated."""
        if all(problem.row != known.row for known in self.skipped):
            self.skipped.append(problem)
            stop_beyond_tolerance(self.spec, self.skipped, self.rows)

    def scan(
        self,
        progress: Callable[[int, int], None] = lambda done, total: None,
        seen: dict[int, Seen] | None = None,
    ) -> list[Problem]:
        """Decode every image and return all problems of the data, sorted by file and line.

        ``progress`` is called with (images read, images). ``seen`` receives id -> what is known, of each
        image that can be decoded. With ``tolerance: 1`` in the settings the source can be made, and
        scanned, however many rows are unusable.
        """
        problems = list(self.skipped)
        check = DecodeCheck(self.spec, self.records, seen=seen is not None)
        found = read(check, self.records, self.spec.workers)
        for done, (i, outcome) in enumerate(zip(self.records, found, strict=True), 1):
            if isinstance(outcome, Problem):
                problems.append(outcome)
            elif outcome is not None and seen is not None:
                seen[i] = outcome
            progress(done, len(self.records))
        return one_for_each_row(problems)

    def _plan(
        self, batch_size: int, key: tuple[object, ...], start_step: int
    ) -> Iterator[tuple[int, int, Bucket, list[int]]]:
        """Yield (epoch, step, bucket, ids of all ranks) of each batch."""
        for epoch, step, ids in batches(self.buckets, batch_size, key, start_step):
            yield epoch, step, self.bucket_of[ids[0]], ids

    def _batch(
        self, epoch: int, step: int, bucket: Bucket, images: dict[int, NDArray[np.uint8]], ids: Sequence[int]
    ) -> ImageBatch:
        """The batch of ``images`` (id -> crop) of this rank; ``ids`` are those of all ranks."""
        width, height = bucket
        pixels = np.stack(list(images.values())) if images else np.empty((0, height, width, 3), np.uint8)
        captions = [self.records[i].caption for i in images]
        position = {i: n for n, i in enumerate(ids)}
        sample_index = [position[i] for i in images]
        return ImageBatch(step, epoch, list(images), to_pixels(pixels), captions, sample_index, bucket)

    def _usable(
        self, crops: Iterable[tuple[int, NDArray[np.uint8] | Problem]]
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for i, image in crops:
            if isinstance(image, Problem):
                self.skip(image)
            else:
                yield i, image

    def _try_some_images(self) -> None:
        """Decode a random sample of the images. Raises DataError if it exceeds the tolerance by itself."""
        chosen = torch.randperm(len(self.records), generator=generator("data", "sample"))[:TRIAL_IMAGES]
        all_ids = list(self.records)
        ids = [all_ids[n] for n in chosen.tolist()]
        results = read(DecodeCheck(self.spec, self.records), ids, self.spec.workers)
        problems = [problem for problem in results if problem is not None]
        if len(problems) > max(1, self.spec.tolerance * len(ids)):
            raise DataError(
                f"{self.spec.images}: {len(problems)} of {len(ids)} images tried cannot be decoded"
                f"{listing(self.spec.images, problems)}\nRepair or remove these rows, or raise 'tolerance' "
                f"({self.spec.tolerance:g}) to skip them."
            )
        for problem in problems:
            self.skip(problem)


def _lists_at(batch: Any, positions: Sequence[int], *names: str) -> dict[str, list]:
    """The elements at ``positions`` of the lists ``names`` of ``batch``."""
    return {name: [getattr(batch, name)[n] for n in positions] for name in names}
