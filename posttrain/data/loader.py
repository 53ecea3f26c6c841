"""Which batches of images does a step train on?

Everything drawn is a function of (key, epoch, image): workers and prefetching change nothing but speed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.data.buckets import bucket_problem, bucket_sizes, nearest_bucket, to_pixels
from posttrain.data.decode import BadImage, image_size
from posttrain.data.lines import Problem, listing
from posttrain.data.order import batches, batches_per_epoch, rank_slice
from posttrain.data.rows import Bucket, Record, read_records, stop_beyond_tolerance
from posttrain.data.settings import Images
from posttrain.data.workers import Crops, Middles, Whole, flipped, read
from posttrain.errors import DataError
from posttrain.support.randomness import generator

SAMPLE = 64
"""Images decoded before a run starts, so that a rotten folder stops it at once."""


@dataclass
class ImageBatch:
    """The n images of one rank at one step; all lists have n entries."""

    step: int
    """Step of the data order, from 0; a resumed run starts at the last one plus 1."""
    epoch: int
    ids: list[int]
    pixels: Tensor
    """(n, 3, h, w) float32 in [-1, 1], on the CPU."""
    captions: list[str]
    places: list[int]
    """Of each in the batch of all ranks, from 0; bad images have one as well."""
    bucket: Bucket
    """(w, h) in pixels."""


@dataclass(frozen=True)
class Choice:
    """Which n images a batch has, and how; all lists have n entries."""

    step: int
    ids: list[int]
    flips: list[bool]
    captions: list[str]
    places: list[int]
    """Of each in the batch of all ranks, from 0."""

    def of(self, numbers: Sequence[int]) -> Choice:
        """Those of ``numbers``, from 0."""

        def some(values: list) -> list:
            return [values[n] for n in numbers]

        return Choice(self.step, *map(some, (self.ids, self.flips, self.captions, self.places)))


class ImageSource:
    """The images that a spec lists, each assigned to a bucket whose sides are multiples of ``divisor``.

    Raises DataError if the spec's files cannot be read, or if more rows than it tolerates are unusable.
    ``skipped`` lists the unusable rows known so far, each once; on several ranks each knows only the
    undecodable images that it met itself. ``notes`` are worth telling the user.
    """

    def __init__(self, spec: Images, divisor: int):
        table = read_records(spec)
        self.spec, self.rows, self.notes = spec, table.rows, table.notes
        self.skipped: list[Problem] = list(table.problems)
        self.records: dict[int, Record] = {}
        self.buckets: dict[Bucket, list[int]] = {}
        sizes = bucket_sizes(spec.resolution, divisor) if spec.resolution else []
        for record in table.records:
            bucket = _assign(record, spec, divisor, sizes)
            if isinstance(bucket, Problem):
                self.skipped.append(bucket)
                continue
            self.records[record.id] = record
            self.buckets.setdefault(bucket, []).append(record.id)
        stop_beyond_tolerance(spec, self.skipped, self.rows)
        self.bucket_of = {i: bucket for bucket, ids in self.buckets.items() for i in ids}
        self._decode_sample()

    def batches_per_epoch(self, batch_size: int) -> int:
        """How many steps see every image once, where no image turns out to be unusable."""
        return batches_per_epoch(self.buckets, batch_size)

    def batches(
        self,
        batch_size: int,
        seed_key: tuple[object, ...],
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[ImageBatch]:
        """The batches of ``rank`` from ``start_step`` on, without end; ``batch_size`` counts all ranks.

        An image that cannot be decoded is left out of its batch and noted in ``skipped``. A batch that is
        left empty is passed over: its step number is missing. On several ranks it is yielded with n = 0
        instead, as where the batch has fewer images than there are ranks, so that all ranks stay at one step.
        Raises DataError when more rows than tolerated are skipped; ValueError for numbers out of range.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, not {rank}")

        plan = functools.partial(self._plan, batch_size, seed_key, start_step)
        jobs = ((epoch, i) for epoch, _, _, ids in plan() for i in rank_slice(ids, rank, world))
        if rank >= min(batch_size, max(map(len, self.buckets.values()))):
            jobs = iter(())  # every slice is empty, and looking ahead for a job would not end
        crops = iter(read(Crops(self.spec, self.records, self.bucket_of, seed_key), jobs, self.spec.workers))
        for epoch, step, bucket, ids in plan():
            # ids come first, so that no crop of the next batch is taken when they end.
            images = dict(self._usable(zip(rank_slice(ids, rank, world), crops, strict=False)))
            if images or world > 1:
                yield self._batch(epoch, step, bucket, images, ids)

    def choices(
        self,
        batch_size: int,
        seed_key: tuple[object, ...],
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Choice]:
        """The batches of :meth:`batches`, but no image is opened, so one that cannot be decoded is listed."""
        for epoch, step, _, everyone in self._plan(batch_size, seed_key, start_step):
            ids = rank_slice(everyone, rank, world)
            flips = [flipped(self.spec, seed_key, epoch, i) for i in ids]
            places = rank_slice(range(len(everyone)), rank, world)
            yield Choice(step, ids, flips, [self.records[i].caption for i in ids], places)

    def centred(
        self, jobs: Sequence[tuple[int, bool]], workers: int | None = None
    ) -> Iterator[tuple[int, bool, Tensor | None]]:
        """(id, mirrored?, (3, h, w) pixels in [-1, 1] from the image's middle) of each (id, mirrored?).

        Instead of the pixels of an image that cannot be decoded there is None, and ``skipped`` says why.
        ``workers`` are the data's by default. Raises DataError when more rows than tolerated are skipped.
        """
        images = read(
            Middles(self.spec, self.records, self.bucket_of),
            jobs,
            self.spec.workers if workers is None else workers,
        )
        for (i, flip), image in zip(jobs, images, strict=True):
            if isinstance(image, Problem):
                self._skip(image)
                yield i, flip, None
            else:
                yield i, flip, to_pixels(image[None])[0]

    def _plan(
        self, batch_size: int, seed_key: tuple[object, ...], start_step: int
    ) -> Iterator[tuple[int, int, Bucket, list[int]]]:
        """(epoch, step, bucket, ids of all ranks) of each batch."""
        for epoch, step, ids in batches(self.buckets, batch_size, seed_key, start_step):
            yield epoch, step, self.bucket_of[ids[0]], ids

    def scan(self, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Problem]:
        """Every problem in the data, by line, after reading each image in full.

        ``progress`` is called with (images read, images). To see all problems of data that has more than
        it tolerates, construct the source with tolerance 1.
        """
        found = {problem.line: problem for problem in self.skipped}
        problems = read(Whole(self.spec, self.records), self.records, self.spec.workers)
        for done, problem in enumerate(problems, 1):
            if problem is not None:
                found.setdefault(problem.line, problem)
            progress(done, len(self.records))
        return [found[line] for line in sorted(found)]

    def _batch(
        self, epoch: int, step: int, bucket: Bucket, images: dict[int, NDArray[np.uint8]], ids: Sequence[int]
    ) -> ImageBatch:
        width, height = bucket
        pixels = np.stack(list(images.values())) if images else np.empty((0, height, width, 3), np.uint8)
        captions = [self.records[i].caption for i in images]
        place = {image: i for i, image in enumerate(ids)}
        places = [place[image] for image in images]
        return ImageBatch(step, epoch, list(images), to_pixels(pixels), captions, places, bucket)

    def _usable(
        self, crops: Iterable[tuple[int, NDArray[np.uint8] | Problem]]
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for i, image in crops:
            if isinstance(image, Problem):
                self._skip(image)
            else:
                yield i, image

    def _skip(self, problem: Problem) -> None:
        if all(problem.line != known.line for known in self.skipped):
            self.skipped.append(problem)
            stop_beyond_tolerance(self.spec, self.skipped, self.rows)

    def _decode_sample(self) -> None:
        order = torch.randperm(len(self.records), generator=generator("data", "sample"))[:SAMPLE].tolist()
        ids = list(self.records)
        jobs = [ids[i] for i in order]
        tried = read(Whole(self.spec, self.records), jobs, self.spec.workers)
        failed = [problem for problem in tried if problem is not None]
        if len(failed) > max(1, self.spec.tolerance * len(jobs)):
            raise DataError(
                f"{self.spec.images}: {len(failed)} of {len(jobs)} images tried cannot be decoded"
                f"{listing(self.spec.images, failed)}\nRepair or remove these rows, or raise 'tolerance' "
                f"({self.spec.tolerance:g}) to skip them."
            )
        for problem in failed:
            self._skip(problem)


def _assign(record: Record, spec: Images, divisor: int, sizes: Sequence[Bucket]) -> Bucket | Problem:
    if not sizes:
        if record.bucket is None:
            reason = "no 'bw' and 'bh'; add them, or give the recipe's data a 'resolution'"
        elif not (reason := bucket_problem(record.bucket, divisor, spec.max_pixels)):
            return record.bucket
        return Problem(record.line, record.path, reason)
    try:
        return nearest_bucket(*(record.bucket or image_size(record.path, spec.max_pixels)), sizes)
    except BadImage as error:
        return Problem(record.line, record.path, error.reason)
