"""The batches that a stage trains on: encoded images with captions, or prompts in groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any, TypeVar

import torch
from torch import Tensor

from posttrain.algorithm import Batch
from posttrain.data.family import Opening
from posttrain.data.lines import Problem, one_for_each_row
from posttrain.data.loader import ImageBatch, ImageSource, PlannedBatch
from posttrain.data.order import batches
from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import AnyPrompts, PromptFile
from posttrain.data.source import BatchSource
from posttrain.data.table import digest_of_rows, stop_beyond_tolerance
from posttrain.errors import DataError, ModelError
from posttrain.model import FlowModel
from posttrain.sampling.prompts import encode
from posttrain.support.randomness import Draws

Part = TypeVar("Part", ImageBatch, PlannedBatch)


class ImageBatchSource(BatchSource):
    """Captioned images, encoded batch by batch or read from a cache of latents.

    A sample has one image of each source in ``images``. They list equal ids, captions and buckets, and so
    are cropped and mirrored alike. ``Batch.latents`` are those of the first source's images, and
    ``Batch.fields`` has those of each other one by its name. A sample without one of its images is left out.
    """

    def __init__(self, images: Mapping[str, ImageSource], opening: Opening) -> None:
        self.images, self.latents = images, {}
        self._told = {name: len(source.skipped) for name, source in images.items()}  # known to all processes
        self.model, self.batch_size, self.world = opening.model, opening.batch_size, opening.world
        self.first = first = next(iter(images.values()))
        for bucket, ids in first.buckets.items():
            _check_size(self.model, bucket, first, ids[0])
        self.notes, self.contents = first.notes, first.files
        self.files = {"rows": first.listed} if first.listed is not None else {}
        self.prompts = list(dict.fromkeys(record.caption for record in first.records.values()))
        width, height = next(iter(first.buckets))
        side = round((width * height) ** 0.5 / self.model.divisor) * self.model.divisor
        self.size = (side, side)
        width, height = max(first.buckets, key=lambda bucket: bucket[0] * bucket[1])
        self.largest = (height, width)

    def batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        if self.latents:
            yield from self._cached_batches(key, start)
            return
        place = (self.batch_size, key, start, self.world.rank, self.world.size)
        streams = [((batch, None) for batch in images.batches(*place)) for images in self.images.values()]
        for aligned in self._in_step(streams):
            first = aligned[0][0]
            counts = self._counts(first.ids)
            if not (total := sum(counts)):
                continue
            filled = [filled_up(batch, max(counts)) for batch, _ in aligned]
            draws = Draws((*key, first.step), filled[0].ids, self.model.device)
            others = [
                encoded_images(images, self.model, self._draws(name, draws))
                for name, images in list(zip(self.images, filled, strict=True))[1:]
            ]
            batch = encoded(filled[0], self.model, draws)
            metadata, fields = self._metadata(filled[0].ids), self._fields(others)
            yield first.step, replace(batch, total=total, metadata=metadata, fields=fields), draws

    def _cached_batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        world = self.world
        caches = {name: self.latents[name] for name in self.images}
        place = (self.batch_size, key, start, world.rank, world.size)
        streams = [cache.batches(*place) for cache in caches.values()]
        for aligned in self._in_step(streams):
            first = aligned[0][0]
            counts = self._counts(first.ids)
            if not (total := sum(counts)):
                continue
            fillers = max(counts) - len(first.ids)
            entries = [list(found) for _, found in aligned]
            if max(counts) > min(counts):  # all processes take part, since one of them may have no entry
                examples = world.gather_objects([found[0] for found in entries] if first.ids else None)
                example = next(found for found in examples if found is not None)
                for found, one in zip(entries, example, strict=True):
                    found += [one] * fillers
            filled = with_fillers(first, fillers)
            draws = Draws((*key, first.step), filled.ids, self.model.device)
            conditions, rows = encode(self.model, filled.captions)
            latents = [
                cache.latents(found, self._draws(name, draws))
                for (name, cache), found in zip(caches.items(), entries, strict=True)
            ]
            batch = Batch(latents[0], rows, conditions, self._metadata(filled.ids), total=total)
            position = torch.tensor(filled.sample_index, device=rows.device)
            yield first.step, replace(batch, sample_index=position, fields=self._fields(latents[1:])), draws

    def _in_step(self, streams: Sequence[Iterator[tuple[Part, Any]]]) -> Iterator[list[tuple[Part, Any]]]:
        """Yield the streams' batches of one step, each of the samples that all of them have.

        An element is a batch with a list for each of its images, or with None. On one process a stream leaves
        out a step in which it has no sample, and so does this one."""
        while True:
            heads = [next(stream) for stream in streams]
            while (step := max(batch.step for batch, _ in heads)) > min(batch.step for batch, _ in heads):
                pairs = zip(heads, streams, strict=True)
                heads = [head if head[0].step == step else next(stream) for head, stream in pairs]
            if len(heads) > 1:
                heads = _of_all(heads)
                stop_beyond_tolerance(self.first.spec, self._problems(), self.first.rows)
            if heads[0][0].ids or self.world.size > 1:
                yield heads

    def _counts(self, ids: Sequence[int]) -> list[int]:
        """How many samples each process has in a step; this one has ``ids``. All learn which rows another one
        could not read, since the tolerance is that of the whole data. Raises DataError beyond it."""
        new = {name: images.skipped[self._told[name] :] for name, images in self.images.items()}
        of_all = self.world.gather_objects((len(ids), new))
        for name, images in self.images.items():
            for problem in chain.from_iterable(problems[name] for _, problems in of_all):
                images.skip(problem)
            self._told[name] = len(images.skipped)
        return [count for count, _ in of_all]

    def _draws(self, name: str, draws: Draws) -> Draws:
        """The draws of the encoder for the source ``name``; the first has those of the batch."""
        return draws if self.images[name] is self.first else replace(draws, key=(*draws.key, name))

    def _fields(self, latents: Sequence[Tensor]) -> dict[str, Tensor]:
        """The ``latents`` of all sources but the first, by their names."""
        return dict(zip(list(self.images)[1:], latents, strict=True))

    def _metadata(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """What the rows of the samples ``ids`` say; of a filler, the empty prompt."""
        records = self.first.records
        return [records[i].metadata if i in records else {"prompt": ""} for i in ids]

    def _problems(self) -> list[Problem]:
        """The samples that were left out, one problem for each."""
        return one_for_each_row(problem for images in self.images.values() for problem in images.skipped)

    def skipped(self) -> list[str]:
        listed = (None, self.first.listed)
        return [
            str(problem) if problem.file in listed else problem.located(self.first.spec.images)
            for problem in self._problems()
        ]

    def digests(self) -> Mapping[str, str]:
        if self.first.listed is not None:
            return {}
        rows = (record for images in self.images.values() for record in images.records.values())
        return {"captions": digest_of_rows(rows)}


class PromptBatchSource(BatchSource):
    """Prompts, each ``group_size`` times in its batch. An epoch has every prompt once.

    Images are square, ``resolution`` pixels wide. A process has an equal part of each batch.
    """

    def __init__(self, prompts: AnyPrompts, resolution: int, opening: Opening) -> None:
        self.model, self.group_size = opening.model, opening.samples_per_prompt
        self.groups = opening.batch_size // self.group_size
        size = self.groups * self.group_size // opening.world.size
        self.sample_index = range(size * opening.world.rank, size * (opening.world.rank + 1))
        """This process's samples in the batch of all processes."""
        self.rows: list[dict[str, Any]] = prompt_rows(prompts, opening.rewards)
        self.prompts = list(dict.fromkeys(row["prompt"] for row in self.rows))
        self.size = self.largest = (resolution, resolution)
        self.files = {"prompts": prompts.path} if isinstance(prompts, PromptFile) else {}

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


def _of_all(heads: Sequence[tuple[Part, Any]]) -> list[tuple[Part, Any]]:
    """The ``heads``, batches of one step, without the samples that one of them lacks."""
    usable = set(heads[0][0].ids).intersection(*(batch.ids for batch, _ in heads[1:]))
    taken = []
    for batch, entries in heads:
        kept = [n for n, i in enumerate(batch.ids) if i in usable]
        taken.append((batch.take(kept), None if entries is None else [entries[n] for n in kept]))
    return taken


def filled_up(images: ImageBatch, size: int) -> ImageBatch:
    """``images`` with black fillers at the end, ``size`` images in all."""
    fillers = size - len(images.ids)
    black = torch.zeros((fillers, *images.pixels.shape[1:]), dtype=images.pixels.dtype)
    return replace(with_fillers(images, fillers), pixels=torch.cat([images.pixels, black]))


def with_fillers(images: Part, fillers: int) -> Part:
    """``images`` with the ids, captions and sample indices of ``fillers`` fillers after their own."""
    return replace(
        images,
        ids=[*images.ids, *range(-fillers, 0)],
        captions=[*images.captions, *[""] * fillers],
        sample_index=[*images.sample_index, *[-1] * fillers],
    )


def encoded(images: ImageBatch, model: FlowModel, draws: Draws) -> Batch:
    """``images`` as latents and conditions of ``model``; ``draws`` give the encoder's posterior noise."""
    conditions, rows = encode(model, images.captions)
    sample_index = torch.tensor(images.sample_index, device=rows.device)
    latents = encoded_images(images, model, draws)
    metadata = [{"prompt": caption} for caption in images.captions]
    return Batch(latents, rows, conditions, metadata, sample_index=sample_index)


def encoded_images(images: ImageBatch, model: FlowModel, draws: Draws) -> Tensor:
    """The latents (n, c, h, w) of ``images``; ``draws`` give the encoder's posterior noise."""
    noise = draws.normal("posterior", model.latent_shape(*images.pixels.shape[-2:]))
    return model.encode_images(images.pixels, noise)


def _check_size(model: FlowModel, bucket: tuple[int, int], images: ImageSource, example: int) -> None:
    """Raise DataError if ``model`` cannot be trained at the size ``bucket``, (width, height) in pixels."""
    try:
        model.latent_shape(bucket[1], bucket[0])
    except ModelError as error:
        problem = images.records[example].problem(f"{error}; give a smaller resolution, bw or bh")
        raise DataError(problem.located(images.spec.images)) from error
