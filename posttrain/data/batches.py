"""The batches that a stage trains on: encoded images with captions, or prompts in groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.algorithm import Batch
from posttrain.data.loader import ImageBatch, ImageSource, PlannedBatch
from posttrain.data.order import batches
from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import Images, PromptData, ShapesData
from posttrain.distributed.world import ALONE, World
from posttrain.model import FlowModel
from posttrain.reward import Reward
from posttrain.sampling.prompts import encode
from posttrain.support.randomness import Draws


class EncodedImages(Protocol):
    """Images encoded before the stage began, for example :class:`posttrain.cache.latents.LatentCache`."""

    def batches(
        self, batch_size: int, key: tuple[object, ...], start: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[PlannedBatch, list[dict[str, Tensor]]]]:
        """Yield the batches of ``rank`` from ``start`` on, each with the stored tensors of its images."""
        ...

    def latents(self, entries: Sequence[dict[str, Tensor]], draws: Draws) -> Tensor:
        """The latents (n, c, h, w), float32, of the stored ``entries`` of n >= 1 images."""
        ...


class BatchSource(ABC):
    """Yields the batches of a stage; on several processes, this process's part of each batch.

    The order is a function of a key, so it can be resumed anywhere. All processes' parts have equally many
    rows, so that all processes make the same forwards.
    """

    notes: Sequence[str] = ()
    """Remarks on the data for the user."""
    prompts: Sequence[str]
    """The distinct prompts, in the order of the data."""
    size: tuple[int, int]
    """(height, width) in pixels of the images that image grids show."""
    largest: tuple[int, int]
    """(height, width) in pixels of the largest images in any batch."""

    @abstractmethod
    def batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        """Yield (number, batch, its random draws) from batch number ``start`` (from 0) on, without end.

        The number of a batch in which no sample can be used is left out.
        """

    def skipped(self) -> list[str]:
        """The samples that were left out so far, each with the reason."""
        return []


class ImageBatchSource(BatchSource):
    """Images and captions, encoded batch by batch, or read from a cache of latents.

    ``batch_size`` counts the samples of all processes. Shapes scenes are rendered into the folder ``work``.
    """

    latents: EncodedImages | None = None
    """The cache of latents; :mod:`posttrain.stages.caches` sets it."""

    def __init__(
        self,
        data: Images | ShapesData,
        model: FlowModel,
        batch_size: int,
        work: Path,
        world: World = ALONE,
    ) -> None:
        self.model, self.batch_size, self.world = model, batch_size, world
        self.images = ImageSource(data.build(work), divisor=model.divisor)
        self.notes = self.images.notes
        self.prompts = list(dict.fromkeys(record.caption for record in self.images.records.values()))
        width, height = next(iter(self.images.buckets))
        side = round((width * height) ** 0.5 / model.divisor) * model.divisor
        self.size = (side, side)
        width, height = max(self.images.buckets, key=lambda bucket: bucket[0] * bucket[1])
        self.largest = (height, width)

    def batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        if self.latents is not None:
            yield from self._cached_batches(self.latents, key, start)
            return
        for images in self.images.batches(self.batch_size, key, start, self.world.rank, self.world.size):
            counts = self.world.gather_objects(len(images.ids))
            if not (total := sum(counts)):
                continue
            filled = filled_up(images, max(counts))
            draws = Draws((*key, images.step), filled.ids, self.model.device)
            batch = encoded(filled, self.model, draws)
            yield images.step, replace(batch, total=total), draws

    def _cached_batches(
        self, cache: EncodedImages, key: tuple[object, ...], start: int
    ) -> Iterator[tuple[int, Batch, Draws]]:
        world = self.world
        for planned, entries in cache.batches(self.batch_size, key, start, world.rank, world.size):
            counts = world.gather_objects(len(entries))
            if not (total := sum(counts)):
                continue
            fillers = max(counts) - len(entries)
            if max(counts) > min(counts):  # all processes take part, since one of them may have no entry
                first_entries = world.gather_objects(entries[0] if entries else None)
                entries += [next(entry for entry in first_entries if entry is not None)] * fillers
            ids, captions, sample_index = _with_fillers(planned, fillers)
            draws = Draws((*key, planned.step), ids, self.model.device)
            conditions, rows = encode(self.model, captions)
            position = torch.tensor(sample_index, device=rows.device)
            latents = cache.latents(entries, draws)
            yield planned.step, Batch(latents, rows, conditions, sample_index=position, total=total), draws

    def skipped(self) -> list[str]:
        return [str(problem) for problem in self.images.skipped]


class PromptBatchSource(BatchSource):
    """Prompts, each ``group_size`` times in its batch. An epoch has every prompt once.

    ``batch_size`` counts the samples of all processes; ``group_size`` divides it.
    """

    def __init__(
        self,
        data: PromptData,
        model: FlowModel,
        batch_size: int,
        group_size: int,
        rewards: Sequence[Reward] = (),
        world: World = ALONE,
    ) -> None:
        self.model, self.group_size, self.groups = model, group_size, batch_size // group_size
        size = self.groups * group_size // world.size
        self.sample_index = range(size * world.rank, size * (world.rank + 1))
        """This process's samples in the batch of all processes."""
        self.rows: list[dict[str, Any]] = prompt_rows(data.prompts, rewards)
        self.prompts = list(dict.fromkeys(row["prompt"] for row in self.rows))
        self.size = self.largest = (data.resolution, data.resolution)

    def batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        order = self._row_order(key, start * self.groups)
        for number in count(start):
            batch = self._batch([next(order) for _ in range(self.groups)])
            yield number, batch, Draws((*key, number), self.sample_index, self.model.device)

    def _batch(self, chosen: Sequence[int]) -> Batch:
        """This process's part of the batch of groups whose prompts are the rows ``chosen``."""
        group = [i // self.group_size for i in self.sample_index]
        rows = [self.rows[chosen[g]] for g in group]
        conditions, prompt_index = encode(self.model, [row["prompt"] for row in rows])
        # the images do not exist yet, so the latents have a shape only
        latents = torch.empty((len(rows), *self.model.latent_shape(*self.size)), device="meta")
        sample_index = torch.tensor(self.sample_index, device=prompt_index.device)
        total = self.groups * self.group_size
        return Batch(latents, prompt_index, conditions, rows, torch.tensor(group), sample_index, total=total)

    def _row_order(self, key: tuple[object, ...], start: int) -> Iterator[int]:
        one_bucket = {(1, 1): range(len(self.rows))}
        for _, _, ids in batches(one_bucket, 1, key, start):
            yield ids[0]


def batch_source_of(
    data: Images | ShapesData | PromptData,
    model: FlowModel,
    work: Path,
    batch_size: int,
    samples_per_prompt: int = 1,
    rewards: Sequence[Reward] = (),
    world: World = ALONE,
) -> BatchSource:
    """The batch source of a stage's ``data``. Shapes scenes are rendered into the folder ``work`` first."""
    if isinstance(data, PromptData):
        return PromptBatchSource(data, model, batch_size, samples_per_prompt, rewards, world)
    return ImageBatchSource(data, model, batch_size, work, world)


def filled_up(images: ImageBatch, size: int) -> ImageBatch:
    """``images`` with black fillers at the end, ``size`` images in all."""
    fillers = size - len(images.ids)
    ids, captions, sample_index = _with_fillers(images, fillers)
    black = torch.zeros((fillers, *images.pixels.shape[1:]), dtype=images.pixels.dtype)
    pixels = torch.cat([images.pixels, black])
    return replace(images, ids=ids, pixels=pixels, captions=captions, sample_index=sample_index)


def _with_fillers(images: ImageBatch | PlannedBatch, fillers: int) -> tuple[list[int], list[str], list[int]]:
    """The ids, captions and sample indices of ``images``, then those of ``fillers`` fillers."""
    return (
        [*images.ids, *range(-fillers, 0)],
        [*images.captions, *[""] * fillers],
        [*images.sample_index, *[-1] * fillers],
    )


def encoded(images: ImageBatch, model: FlowModel, draws: Draws) -> Batch:
    """``images`` as latents and conditions of ``model``; ``draws`` give the encoder's posterior noise."""
    height, width = images.pixels.shape[-2:]
    noise = draws.normal("posterior", model.latent_shape(height, width))
    conditions, rows = encode(model, images.captions)
    sample_index = torch.tensor(images.sample_index, device=rows.device)
    return Batch(model.encode_images(images.pixels, noise), rows, conditions, sample_index=sample_index)
