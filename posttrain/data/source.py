"""What a stage's data become once they are opened: a source of batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from posttrain.algorithm import Batch
from posttrain.data.loader import ImageSource, PlannedBatch
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
    files: Mapping[str, Path] = {}
    """The files that list the data, by what they list, such as ``rows``. A run records their hashes and tells
    the user of a change."""
    contents: Mapping[str, Any] | None = None
    """What tells whether the listed images are still the same, without reading them: the ``files`` of
    :class:`posttrain.data.table.Table`. None if there are none."""
    images: Mapping[str, ImageSource] = {}
    """Name -> the images that the cache of latents may keep; the name is for messages."""
    latents: MutableMapping[str, EncodedImages]
    """Name -> the cache of those images, where :mod:`posttrain.stages.caches` has set it."""

    @abstractmethod
    def batches(self, key: tuple[object, ...], start: int) -> Iterator[tuple[int, Batch, Draws]]:
        """Yield (number, batch, its random draws) from batch number ``start`` (from 0) on, without end.

        The number of a batch in which no sample can be used is left out.
        """

    def digests(self) -> Mapping[str, str]:
        """What no one of ``files`` says of the data, such as ``captions``: name -> a hash of it, which is
        recorded too."""
        return {}

    def skipped(self) -> list[str]:
        """The samples that were left out so far, each with the reason."""
        return []
