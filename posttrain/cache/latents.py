"""Reads the latents of training images from the cache, and encodes images that it lacks.

An image's key is a hash of its file, its bucket and whether it is mirrored, so looking it up needs no
decoding. The crop is always the central one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from posttrain.cache.keys import digest
from posttrain.cache.room import Demand
from posttrain.cache.store import Entry, Store, size_of
from posttrain.data.loader import ImageSource, PlannedBatch
from posttrain.data.place import Place
from posttrain.distributed.world import ALONE, World
from posttrain.flow_model import FlowModel, posterior_of
from posttrain.support.heartbeat import beat
from posttrain.support.progress import stage_progress
from posttrain.support.randomness import Draws, generator

LatentKind = Literal["mean_logvar", "sampled"]
DecodedImage = tuple[int, bool, Tensor]
"""An image's id, whether it is mirrored, and its pixels (3, h, w)."""
IMAGE_ENCODE_BATCH = 8
"""Images in one call of the encoder while the cache is filled. The encodings do not depend on it."""
HASH_THREADS = 8
"""Threads that read files to hash them."""


class LatentCache:
    """The encodings of the images of ``source`` by ``model``. Each image is encoded once, kept in ``store``.

    ``kind`` is what is kept: ``mean_logvar``, the encoder's posterior, or ``sampled``, one draw from it. Each
    process of the ``world`` reads a share of the files to hash them, and all know all hashes.
    """

    def __init__(
        self, store: Store, model: FlowModel, source: ImageSource, kind: LatentKind, world: World = ALONE
    ) -> None:
        self.store, self.model, self.source, self.kind = store, model, source, kind
        share = list(source.records.items())[world.rank :: world.size]
        own: dict[int, _Hashed] = {}
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            hashed = pool.map(_hashed, [record.image for _, record in share])
            for (i, _), one in zip(share, hashed, strict=True):
                own[i] = one
                beat()
        self._hashed = {i: one for part in world.gather_objects(own) for i, one in part.items()}

    def fill(self, name: str, console: Console, rank: int = 0, world_size: int = 1) -> None:
        """Encode the images that the store lacks, and their mirror images if the data is flipped.

        ``name`` is the stage's. The size is printed first. On several processes each encodes a share. Raises
        PosttrainError if there is no room or the cache cannot be written, and DataError if too many images
        cannot be decoded.
        """
        flips = (False, True) if self.source.spec.flip else (False,)
        # files with equal content have one key
        jobs = {self._key(i, flip): (i, flip) for i in self.source.records for flip in flips}
        self.store.use(jobs)
        missing = {key: job for key, job in jobs.items() if key not in self.store}
        sizes = self._bytes(jobs.values()), self._bytes(missing.values())
        self.store.room.reserve(
            self.store.folder, Demand(f"{name}: latents", len(jobs), len(missing), *sizes), console
        )
        # Shares are of all images, because processes may disagree on which are missing.
        if share := [missing[key] for key in list(jobs)[rank::world_size] if key in missing]:
            self._encode_all(share, name, console)

    def _encode_all(self, jobs: list[tuple[int, bool]], name: str, console: Console) -> None:
        """Encode each (id, mirrored) of ``jobs``, images of one bucket together."""
        jobs.sort(key=lambda job: self.source.bucket_of[job[0]])
        batch: list[DecodedImage] = []
        with stage_progress(f"{name}: encoding images", len(jobs), 0, console) as bar:
            for done, (i, flip, pixels) in enumerate(self.source.centre_crops(jobs), 1):
                full = len(batch) == IMAGE_ENCODE_BATCH
                if batch and (full or self.source.bucket_of[i] != self.source.bucket_of[batch[0][0]]):
                    self._encode(batch)
                    batch = []
                if (pixels := self._current(i, flip, pixels)) is not None:
                    batch.append((i, flip, pixels))
                bar.update(done)
            self._encode(batch)
            self.store.flush()

    def batches(
        self, batch_size: int, key: tuple[object, ...], start: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[PlannedBatch, list[Entry]]]:
        """Yield the batches of :meth:`ImageSource.batches`, with each image's entry instead of its pixels.

        Missing and damaged entries are encoded and kept. An image that cannot be decoded is left out.
        """
        for planned in self.source.planned_batches(batch_size, key, start, rank, world_size):
            entries = [self._entry(i, flip) for i, flip in zip(planned.ids, planned.flips, strict=True)]
            self.store.flush()
            usable = planned.take([n for n, entry in enumerate(entries) if entry is not None])
            if usable.ids or world_size > 1:
                yield usable, [entry for entry in entries if entry is not None]

    def latents(self, entries: Sequence[Entry], draws: Draws) -> Tensor:
        """The latents (n, c, h, w), float32, of n >= 1 ``entries``.

        Of ``mean_logvar`` they are drawn with ``draws``, and are the same as without a cache.
        """
        kept = {n: torch.stack([e[n] for e in entries]).to(self.model.device) for n in entries[0]}
        if self.kind == "sampled":
            return kept["latents"]
        noise = draws.normal("posterior", kept["mean"].shape[1:])
        return self.model.latents(kept["mean"], kept["logvar"], noise)

    def _entry(self, i: int, flip: bool) -> Entry | None:
        if (entry := self.store.read(self._key(i, flip))) is not None:
            return entry
        if (pixels := self._current(i, flip, self._decoded(i, flip))) is not None:
            self._encode([(i, flip, pixels)])
        return self.store.read(self._key(i, flip))

    def _decoded(self, i: int, flip: bool) -> Tensor | None:
        ((_, _, pixels),) = self.source.centre_crops([(i, flip)], workers=0)
        return pixels

    def _current(self, i: int, flip: bool, pixels: Tensor | None) -> Tensor | None:
        """``pixels``; of a file that was replaced since it was hashed, those that it has now, hashed anew.

        The key of one file must not get the encoding of another, which all later runs would read.
        """
        image = self.source.records[i].image
        while pixels is not None and _stamp(image) != self._hashed[i].stamp:
            self._hashed[i] = _hashed(image)
            pixels = self._decoded(i, flip)
        return pixels

    def _encode(self, images: Sequence[DecodedImage]) -> None:
        if not images:
            return
        posterior = posterior_of(self.model, torch.stack([pixels for _, _, pixels in images]))
        for (i, flip, _), mean, logvar in zip(images, *posterior, strict=True):
            key, name = self._key(i, flip), f"the image {str(self.source.records[i].image)!r}"
            if self.kind == "mean_logvar":
                self.store.add(key, {"mean": mean, "logvar": logvar}, name)
            else:
                # The noise is a function of the key, so every run and process keeps the same draw.
                noise = torch.randn(mean.shape, generator=generator("cache", key)).to(mean.device)
                self.store.add(key, {"latents": self.model.latents(mean, logvar, noise)}, name)

    def _key(self, i: int, flip: bool) -> str:
        return digest(self._hashed[i].sha256, *self.source.bucket_of[i], flip)

    def _bytes(self, jobs: Iterable[tuple[int, bool]]) -> int:
        """Bytes on disk of the entries of ``jobs``, at most."""
        names = ("mean", "logvar") if self.kind == "mean_logvar" else ("latents",)
        size = {}
        for width, height in self.source.buckets:
            empty = torch.empty(self.model.latent_shape(height, width), device="meta")
            size[width, height] = size_of(dict.fromkeys(names, empty), self.store.dtype)
        return sum(size[self.source.bucket_of[i]] for i, _ in jobs)


class _Hashed(NamedTuple):
    """A hash of an image's bytes."""

    sha256: str
    stamp: tuple[int, int] | None
    """What its file was when the hash was begun."""


def _hashed(image: Place) -> _Hashed:
    stamp = _stamp(image)  # first, so that a file that is replaced meanwhile has another one afterwards
    try:
        return _Hashed(image.sha256(), stamp)
    except OSError:
        return _Hashed(str(image), stamp)  # an unreadable file is never kept, and decoding will report why


def _stamp(image: Place) -> tuple[int, int] | None:
    """What tells whether the image's file was replaced; None if it is not there."""
    try:
        status = image.path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
