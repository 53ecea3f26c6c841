"""The data that give images with captions: your own as they lie, and rendered shapes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.data.batches import ImageBatchSource
from posttrain.data.family import Data, Facts, Opening
from posttrain.data.layouts.captions import ENDINGS
from posttrain.data.loader import ImageSource
from posttrain.data.place import Place
from posttrain.data.rows import read_records
from posttrain.data.settings import MAX_WORKERS, Images, Reading
from posttrain.data.source import BatchSource
from posttrain.errors import DataError, PosttrainError
from posttrain.registry import FREE
from posttrain.support.paths import folder_problem, is_file, is_folder

SHAPES_SIDE = 64
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
"""``owner/name``: a data set of the hub."""


class ImageFiles(Data, ABC):
    """Captioned images that can be listed. A subclass writes :meth:`build` and :meth:`facts`."""

    gives: ClassVar = "images"
    images_per_sample: ClassVar = 1

    @abstractmethod
    def build(self, folder: Path) -> Images:
        """The list of the images. What has to be made first is written below ``folder``, unless it is there.

        Only one process at a time calls this. Raises DataError if it cannot be written.
        """

    def open(self, opening: Opening) -> BatchSource:
        images = ImageSource(self.build(opening.folder), divisor=opening.model.divisor)
        return ImageBatchSource({"images": images}, opening)


class ImageData(Images, ImageFiles):
    """Images with captions, as they lie in a folder, an archive, a table, a list, or on the hub."""

    type: Literal["images"] = "images"

    def build(self, folder: Path) -> Images:
        del folder  # the images exist already
        return self

    def facts(self, path: str) -> Facts:
        try:
            if self.split is not None and not self.images.exists():
                raise DataError("the data set is not a folder of this machine, and a plan downloads nothing")
            # the run applies the tolerance, not the plan
            records = read_records(self.model_copy(update={"tolerance": 1.0})).records
        except DataError as error:
            return facts_without_rows(self, path, error)
        if self.resolution is None:
            width, height = largest_bucket([record.bucket for record in records], self.images, path)
        else:
            width = height = self.resolution
        images = count_images(record.image for record in records) * (2 if self.flip else 1)
        return Facts((height, width), len({record.caption for record in records}), images)

    def in_words(self) -> str:
        return f"{self.images}, resolution {self.resolution or 'as its rows say'}"

    def problems(self) -> Iterator[tuple[str, str]]:
        if (message := self._place_problem()) is not None:
            yield "images", message
        yield from image_dir_problems(self)

    def _place_problem(self) -> str | None:
        """Why there are no images at their place; None if they are there, or may be on the hub."""
        if is_file(self.images) and self.images.suffix.lower() in ENDINGS:
            return f"{str(self.images)!r} is one image: name its folder, or a list of images"
        if is_folder(self.images) or is_file(self.images):
            return None
        name = self.images.as_posix()
        hub = HUB_NAME.fullmatch(name) is not None
        if self.split is not None and hub:
            return None
        listed = self.images.suffix.lower() in (".jsonl", ".csv", ".parquet", ".tar")
        where = f"looked at {self.images.absolute()}; relative paths start at the current folder"
        hint = "; a data set of the hub also needs its 'split'" if hub and self.split is None else ""
        return f"no {'file' if listed else 'file or folder'} {name!r} ({where}){'' if listed else hint}"

    def to_scan(self, divisor: int) -> Sequence[ImageSource]:
        return [ImageSource(self.model_copy(update={"tolerance": 1.0}), divisor)]


class ShapesData(ImageFiles):
    """Scenes of coloured shapes with captions, rendered before the stage starts."""

    type: Literal["shapes"] = "shapes"
    images: Annotated[int, Field(gt=0, le=10_000_000)]
    """Number of images to render."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the scenes: equal seeds render equal images."""
    style: Literal["clean", "web"] = "clean"
    """``clean`` renders what the caption says; ``web`` adds flaws that images on the web have."""
    workers: Annotated[int, Field(ge=0, le=MAX_WORKERS), FREE] = 0
    """Processes that decode images ahead; with 0 the training process decodes. It changes speed only."""

    def build(self, folder: Path) -> Images:
        """Render the images into a subfolder of ``folder``, which stages share, unless it has them."""
        from posttrain.shapes.dataset import build  # only stages that train on shapes need the renderer

        folder = folder / f"shapes-{self.style}-{self.images}-{self.seed}"
        build(folder, self.images, self.seed, self.style)
        return Images(images=folder / "train.jsonl", image_dir=folder / "images", workers=self.workers)

    def facts(self, path: str) -> Facts:
        return Facts((SHAPES_SIDE, SHAPES_SIDE), self.images, self.images)

    def in_words(self) -> str:
        return f"{self.images} rendered Shapes images ({self.style})"


def count_images(places: Iterable[Place]) -> int:
    """How many distinct images lie in ``places``."""
    return len({(place.path, place.start) for place in places})


def image_dir_problems(data: Reading) -> Iterator[tuple[str, str]]:
    """Yield (field, message) where the folder of the images does not exist."""
    if data.image_dir is not None and (message := folder_problem(data.image_dir)) is not None:
        yield "image_dir", message


def facts_without_rows(data: Reading, path: str, error: DataError) -> Facts:
    """The facts of ``data`` whose rows raise ``error`` here. Raises PosttrainError if the rows name sizes."""
    if data.resolution is None:
        reason = str(error).splitlines()[0]
        raise PosttrainError(
            f"{path}.resolution: without it each row names the size of its image, and the rows cannot be "
            f"read here ({reason}): plan on the machine that has the data, or give one size with --set "
            f"{path}.resolution=512"
        ) from error
    return Facts((data.resolution, data.resolution))


def largest_bucket(buckets: Sequence[tuple[int, int] | None], file: Path, path: str) -> tuple[int, int]:
    """The (width, height) of most pixels. Raises PosttrainError if no row names one."""
    if not (named := [bucket for bucket in buckets if bucket is not None]):
        raise PosttrainError(
            f"{path}: no row of {str(file)!r} has 'bw' and 'bh': add them, or set {path}.resolution"
        )
    return max(named, key=lambda bucket: bucket[0] * bucket[1])
