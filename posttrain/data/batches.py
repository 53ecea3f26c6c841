"""A stage's batches: encoded images with captions, or prompts in groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.algorithm import Batch
from posttrain.data.loader import Choice, ImageBatch, ImageSource
from posttrain.data.order import batches
from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import Images, PromptData, ShapesData
from posttrain.distributed.world import ALONE, World
from posttrain.model import FlowModel
from posttrain.reward import Reward
from posttrain.sampling.prompts import encode
from posttrain.support.randomness import Draws


class EncodedImages(Protocol):
    """Images that were encoded before the stage began."""

    def batches(
        self, batch_size: int, key: tuple[object, ...], start: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Choice, list[dict[str, Tensor]]]]:
        """The chosen images of each batch from ``start`` on, and what is kept of each."""
        ...

    def latents(self, entries: Sequence[dict[str, Tensor]], draws: Draws) -> Tensor:
        """(n, c, h, w) float32 latents of n >= 1 ``entries``."""
        ...


class Feed(ABC):
    """The batches of a stage, in an order that is a function of its key; of each, this process's part.

    All processes' parts are of one size, so that all make the same number of forwards.
    """

    notes: Sequence[str] = ()
    """What a person should know of the data."""
    prompts: Sequence[str]
    """Distinct prompts, for image grids."""
    size: tuple[int, int]
    """(height, width) in pixels of the images in those grids."""
    largest: tuple[int, int]
    """(height, width) in pixels of the batches' largest images."""

    @abstractmethod
    def batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        """(number, batch, its draws) from batch ``start`` (from 0) on, without end; numbers may be missing,
        where a batch cannot be used."""

    def skipped(self) -> list[str]:
        """Samples left out so far, and why."""
        return []


class ImageFeed(Feed):
    """Images and captions, encoded batch by batch, or read from a cache."""

    latents: EncodedImages | None = None
    """Set by :mod:`posttrain.stages.caches`."""

    def __init__(
        self,
        data: Images | ShapesData,
        model: FlowModel,
        batch_size: int,
        work: Path,
        world: World = ALONE,
    ) -> None:
        self.model, self.batch_size, self.world = model, batch_size, world
        self.source = ImageSource(data.materialise(work), divisor=model.divisor)
        self.notes = self.source.notes
        self.prompts = list(dict.fromkeys(record.caption for record in self.source.records.values()))
        width, height = next(iter(self.source.buckets))
        side = round((width * height) ** 0.5 / model.divisor) * model.divisor
        self.size = (side, side)
        width, height = max(self.source.buckets, key=lambda bucket: bucket[0] * bucket[1])
        self.largest = (height, width)

    def batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        if self.latents is not None:
            yield from self._cached(self.latents, key, start)
            return
        for images in self.source.batches(self.batch_size, key, start, self.world.rank, self.world.size):
            here = self.world.gather_objects(len(images.ids))
            if not (total := sum(here)):
                continue  # not one image of the whole batch can be used
            filled = filled_up(images, max(here))
            draws = Draws((*key, images.step), filled.ids, self.model.device)
            batch = encoded(filled, self.model, draws)
            yield images.step, replace(batch, total=total), draws

    def _cached(
        self, cache: EncodedImages, key: tuple[object, ...], start: int
    ) -> Iterator[tuple[int, Batch, Draws]]:
        world = self.world
        for images, entries in cache.batches(self.batch_size, key, start, world.rank, world.size):
            here = world.gather_objects(len(entries))
            if not (total := sum(here)):
                continue
            if missing := max(here) - min(here):  # on some process; a filler's latents do not matter
                filler = next(
                    e for e in world.gather_objects(entries[0] if entries else None) if e is not None
                )
                missing = max(here) - len(entries)
                entries += [filler] * missing
            ids, captions = [*images.ids, *range(-missing, 0)], [*images.captions, *[""] * missing]
            draws = Draws((*key, images.step), ids, self.model.device)
            conditions, rows = encode(self.model, captions)
            places = torch.tensor([*images.places, *[-1] * missing], device=rows.device)
            latents = cache.latents(entries, draws)
            yield images.step, Batch(latents, rows, conditions, sample_index=places, total=total), draws

    def skipped(self) -> list[str]:
        return [str(problem) for problem in self.source.skipped]


class PromptFeed(Feed):
    """Prompts, each ``group_size`` times in its batch; every prompt once an epoch."""

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
        self.part = slice(size * world.rank, size * (world.rank + 1))
        """Of the whole batch, the samples that are this process's."""
        self.rows: list[dict[str, Any]] = prompt_rows(data.prompts, rewards)
        self.prompts = list(dict.fromkeys(row["prompt"] for row in self.rows))
        self.size = self.largest = (data.resolution, data.resolution)

    def batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        shape = self.model.latent_shape(*self.size)
        order = self._order(key, start * self.groups)
        for number, chosen in enumerate(iter(lambda: [next(order) for _ in range(self.groups)], None), start):
            everyone = [self.rows[i] for i in chosen for _ in range(self.group_size)]
            place = range(len(everyone))[self.part]
            rows = everyone[self.part]
            conditions, prompt = encode(self.model, [row["prompt"] for row in rows])
            latents = torch.empty((len(rows), *shape), device="meta")
            group = torch.arange(len(chosen)).repeat_interleave(self.group_size)[self.part]
            draws = Draws((*key, number), place, self.model.device)
            places = torch.tensor(place, device=prompt.device)
            yield (
                number,
                Batch(latents, prompt, conditions, rows, group, places, total=len(everyone)),
                draws,
            )

    def _order(self, key: tuple[object, ...], start: int) -> Iterator[int]:
        everything = {(1, 1): range(len(self.rows))}
        for _, _, ids in batches(everything, 1, key, start):
            yield ids[0]


def feed_of(
    data: Images | ShapesData | PromptData,
    model: FlowModel,
    work: Path,
    batch_size: int,
    samples_per_prompt: int = 1,
    rewards: Sequence[Reward] = (),
    world: World = ALONE,
) -> Feed:
    """The feed of a stage's ``data``. Shapes scenes are rendered into the folder ``work`` first."""
    if isinstance(data, PromptData):
        return PromptFeed(data, model, batch_size, samples_per_prompt, rewards, world)
    return ImageFeed(data, model, batch_size, work, world)


def filled_up(images: ImageBatch, size: int) -> ImageBatch:
    """``images``, with black ones after them to make ``size``."""
    missing = size - len(images.ids)
    blank = torch.zeros((missing, *images.pixels.shape[1:]), dtype=images.pixels.dtype)
    return replace(
        images,
        ids=[*images.ids, *range(-missing, 0)],
        pixels=torch.cat([images.pixels, blank]),
        captions=[*images.captions, *[""] * missing],
        places=[*images.places, *[-1] * missing],
    )


def encoded(images: ImageBatch, model: FlowModel, draws: Draws) -> Batch:
    """Images and captions as the model's latents and conditions; the encoder's noise comes from ``draws``."""
    height, width = images.pixels.shape[-2:]
    noise = draws.normal("posterior", model.latent_shape(height, width))
    conditions, rows = encode(model, images.captions)
    places = torch.tensor(images.places, device=rows.device)
    return Batch(model.encode_images(images.pixels, noise), rows, conditions, sample_index=places)
