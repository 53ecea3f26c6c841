"""The interface of a family of data: what a recipe's ``data`` block may be.

A data class is a frozen pydantic model; its fields are those of the block. It says what a sample ``gives``,
and the recipe gives it to algorithms that need just that. It is found by its ``type`` in this package, and in
others by entry points in the group ``posttrain.data``. There are two ways to write one:

- Images that can be listed: subclass :class:`posttrain.data.image_data.ImageFiles` (or
  :class:`posttrain.data.pair_data.PairFiles`) and write ``build``, which names or makes the list.
- Anything else: subclass :class:`Data` and write ``open``, which returns a
  :class:`posttrain.data.source.BatchSource` of your own, and ``facts``.

The engine treats two fields alike in all data classes: ``resolution``, the side of the images in pixels, is
compared with what the model allows, and ``prompts`` (:data:`posttrain.data.settings.AnyPrompts`) is read and
compared with what the stage's rewards can score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from posttrain.data.loader import ImageSource
from posttrain.data.source import BatchSource
from posttrain.distributed.world import ALONE, World
from posttrain.model import FlowModel
from posttrain.registry import Named
from posttrain.reward import Reward


@dataclass(frozen=True)
class Facts:
    """What is known of data before a run. None means that the files are not on this machine."""

    size: tuple[int, int]
    """(height, width) in pixels of the largest images."""
    prompts: int | None = None
    """At most how many distinct prompts there are."""
    images: int | None = None
    """At most how many distinct images are encoded; a mirrored image counts too."""


@dataclass(frozen=True)
class Opening:
    """What data are opened with."""

    model: FlowModel
    """Encodes images and prompts."""
    folder: Path
    """Where data may be written, in subfolders that stages share. It may not exist yet. One process at a time
    opens the data."""
    batch_size: int
    """Samples of a batch over all processes."""
    samples_per_prompt: int = 1
    """Samples of a group; it divides ``batch_size``."""
    rewards: Sequence[Reward] = ()
    """The stage's rewards, which must be able to score the prompts."""
    world: World = ALONE


class Data(Named, ABC):
    """The ``data`` block of a stage."""

    gives: ClassVar[str]
    """What a sample is; an algorithm whose ``needs`` is the same word trains on it.

    ``images``: ``Batch.latents`` are those of the image. ``prompts``: they have a shape only, and
    ``Batch.group`` is set. ``pairs``: they are those of the chosen image, and ``Batch.fields["rejected"]``
    those of the other one. Any other word is yours: describe there what the batch holds.
    """
    images_per_sample: ClassVar[int] = 0
    """How many images of a sample the autoencoder encodes. The cache of latents keeps them, so the source has
    them in ``images``."""

    @abstractmethod
    def open(self, opening: Opening) -> BatchSource:
        """The source of the stage's batches. Raises DataError if the data cannot be used."""

    @abstractmethod
    def facts(self, path: str) -> Facts:
        """What is known of the data before a run, without a model.

        ``path`` is that of the block in the recipe, such as ``stages.sft.data``, for messages. Raises
        PosttrainError if no size is known.
        """

    def in_words(self) -> str:
        """The data in a few words, for ``posttrain check``."""
        return self.type

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (field, message) of what prevents the data from being opened on this machine."""
        yield from ()

    def to_scan(self, divisor: int) -> Sequence[ImageSource]:
        """The images that ``posttrain check --data`` reads, however many of them cannot be used.

        ``divisor``: see :class:`posttrain.data.loader.ImageSource`. None if the run itself makes them.
        """
        del divisor
        return ()

    def for_cache(self) -> Mapping[str, str]:
        """Fields and their values with which every image has one encoding, as the cache of latents needs.
        Empty if it has one already."""
        return {}
