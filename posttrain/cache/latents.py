"""Where do the latents of training images come from: the cache, and the encoder for what it lacks.

An image is found by its file's content and its bucket, so that it need not be decoded to be looked up; the
part that is cut out of it is always its middle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from posttrain.cache.keys import digest
from posttrain.cache.store import Entry, Store, size_of
from posttrain.data.loader import ImageSource, PlannedBatch
from posttrain.model import FlowModel
from posttrain.support.progress import stage_progress
from posttrain.support.randomness import Draws, generator

Kind = Literal["mean_logvar", "sampled"]
Decoded = tuple[int, bool, Tensor]
"""An image's id, whether it is mirrored, and its pixels (3, h, w)."""
AT_ONCE = 8
"""Images in one call of the encoder while the cache is filled; the result does not depend on it."""
READERS = 8
"""Threads that read files for their hashes."""


class LatentCache:
    """What ``model`` encodes the images of ``source`` to, each encoded once and kept in ``store``."""

    def __init__(self, store: Store, model: FlowModel, source: ImageSource, kind: Kind) -> None:
        self.store, self.model, self.source, self.kind = store, model, source, kind
        records = source.records
        with ThreadPoolExecutor(READERS) as pool:
            hashes = pool.map(_content_hash, [record.path for record in records.values()])
            self._hashes = dict(zip(records, hashes, strict=True))

    def fill(self, name: str, console: Console, rank: int = 0, world_size: int = 1) -> None:
        """Encode what is missing of the images, and of their mirrored selves where the data is flipped.

        ``name`` is the stage's. The size is told first. On several processes each encodes a share. Raises
        PosttrainError where there is no room or the cache cannot be written, DataError where too many
        images cannot be decoded.
        """
        flips = (False, True) if self.source.spec.flip else (False,)
        # equal files are one entry
        jobs = {self._key(i, flip): (i, flip) for i in self.source.records for flip in flips}
        self.store.use(jobs)
        missing = {key: job for key, job in jobs.items() if key not in self.store}
        sizes = self._bytes(jobs.values()), self._bytes(missing.values())
        self.store.room.reserve(
            self.store.folder, f"{name}: latents", len(jobs), len(missing), *sizes, console
        )
        # a share of all, since another process may not see the same ones missing
        if not (mine := [missing[key] for key in list(jobs)[rank::world_size] if key in missing]):
            return
        mine.sort(key=lambda job: self.source.bucket_of[job[0]])  # images of one size are encoded together
        waiting: list[Decoded] = []
        with stage_progress(f"{name}: encoding images", len(mine), 0, console) as bar:
            for done, (i, flip, pixels) in enumerate(self.source.centre_crops(mine), 1):
                if len(waiting) == AT_ONCE or (
                    waiting and self.source.bucket_of[i] != self.source.bucket_of[waiting[0][0]]
                ):
                    self._encode(waiting)
                    waiting = []
                if pixels is not None:
                    waiting.append((i, flip, pixels))
                bar.update(done)
            self._encode(waiting)
            self.store.flush()

    def batches(
        self, batch_size: int, key: tuple[object, ...], start: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[PlannedBatch, list[Entry]]]:
        """The batches of :meth:`ImageSource.batches`, with what is kept of each image instead of its pixels.
        What is missing or damaged is encoded, and kept; an image that cannot be is left out."""
        for choice in self.source.planned_batches(batch_size, key, start, rank, world_size):
            entries = [self._entry(i, flip) for i, flip in zip(choice.ids, choice.flips, strict=True)]
            self.store.flush()
            usable = choice.take([n for n, entry in enumerate(entries) if entry is not None])
            if usable.ids or world_size > 1:
                yield usable, [entry for entry in entries if entry is not None]

    def latents(self, entries: Sequence[Entry], draws: Draws) -> Tensor:
        """(n, c, h, w) float32 of n >= 1 ``entries``, drawn by the same ``draws`` as without a cache."""
        kept = {n: torch.stack([e[n] for e in entries]).to(self.model.device) for n in entries[0]}
        if self.kind == "sampled":
            return kept["latents"]
        noise = draws.normal("posterior", kept["mean"].shape[1:])
        return self.model.latents(kept["mean"], kept["logvar"], noise)

    def _entry(self, i: int, flip: bool) -> Entry | None:
        if (entry := self.store.read(self._key(i, flip))) is not None:
            return entry
        for _, _, pixels in self.source.centre_crops([(i, flip)], workers=0):
            if pixels is not None:
                self._encode([(i, flip, pixels)])
        return self.store.read(self._key(i, flip))

    def _encode(self, images: Sequence[Decoded]) -> None:
        if not images:
            return
        posterior = self.model.posterior(torch.stack([pixels for _, _, pixels in images]))
        for (i, flip, _), mean, logvar in zip(images, *posterior, strict=True):
            key = self._key(i, flip)
            if self.kind == "mean_logvar":
                self.store.add(key, {"mean": mean, "logvar": logvar})
            else:
                # a function of the image, so that every run and process keeps the same draw
                noise = torch.randn(mean.shape, generator=generator("cache", key)).to(mean.device)
                self.store.add(key, {"latents": self.model.latents(mean, logvar, noise)})

    def _key(self, i: int, flip: bool) -> str:
        return digest(self._hashes[i], *self.source.bucket_of[i], flip)

    def _bytes(self, jobs: Iterable[tuple[int, bool]]) -> int:
        names = ("mean", "logvar") if self.kind == "mean_logvar" else ("latents",)
        size = {}
        for width, height in self.source.buckets:
            empty = torch.empty(self.model.latent_shape(height, width), device="meta")
            size[width, height] = size_of(dict.fromkeys(names, empty), self.store.dtype)
        return sum(size[self.source.bucket_of[i]] for i, _ in jobs)


def _content_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return str(path)  # what cannot be read is never kept; decoding it will say why
