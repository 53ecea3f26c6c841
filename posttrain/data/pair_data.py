"""The data that give preference pairs: your own in a list or tables, and rendered shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from posttrain.data.batches import ImageBatchSource
from posttrain.data.family import Data, Facts, Opening
from posttrain.data.image_data import (
    SHAPES_SIDE,
    count_images,
    facts_without_rows,
    image_dir_problems,
    largest_bucket,
)
from posttrain.data.layouts.pick_a_pic import SUFFIX, parquet_files, rows_in
from posttrain.data.loader import ImageSource
from posttrain.data.pair_rows import pair_sources, read_pairs
from posttrain.data.settings import MAX_WORKERS, PairList
from posttrain.data.source import BatchSource
from posttrain.errors import DataError
from posttrain.registry import FREE
from posttrain.support.paths import file_problem, is_folder


class PairFiles(Data, ABC):
    """Pairs of images that can be listed. A subclass writes :meth:`build` and :meth:`facts`."""

    gives: ClassVar = "pairs"
    images_per_sample: ClassVar = 2

    @abstractmethod
    def build(self, folder: Path) -> PairList:
        """The list of the pairs. What has to be made first is written below ``folder``, unless it is there.

        Only one process at a time calls this. Raises DataError if it cannot be written.
        """

    def open(self, opening: Opening) -> BatchSource:
        return ImageBatchSource(pair_sources(self.build(opening.folder), opening.model.divisor), opening)


class PairData(PairList, PairFiles):
    """Preference pairs in a list or tables. The two images of a pair are cropped and mirrored alike."""

    type: Literal["pairs"] = "pairs"

    def build(self, folder: Path) -> PairList:
        del folder  # the pairs exist already
        return self

    def facts(self, path: str) -> Facts:
        try:
            if self.resolution is not None and (files := parquet_files(self.pairs)):
                rows = rows_in(files)  # at most, and without reading them
                prompts, images, buckets = rows, 2 * rows, []
            else:
                # the run applies the tolerance, not the plan
                tables = read_pairs(self.model_copy(update={"tolerance": 1.0}))
                prompts = len({record.caption for record in tables[0].records})
                images = count_images(record.image for table in tables for record in table.records)
                buckets = [record.bucket for record in tables[0].records]
        except DataError as error:
            return facts_without_rows(self, path, error)
        if self.resolution is None:
            width, height = largest_bucket(buckets, self.pairs, path)
        else:
            width = height = self.resolution
        return Facts((height, width), prompts, images * (2 if self.flip else 1))

    def in_words(self) -> str:
        return f"pairs of {self.pairs}, resolution {self.resolution or 'as its rows say'}"

    def problems(self) -> Iterator[tuple[str, str]]:
        if is_folder(self.pairs):
            if not parquet_files(self.pairs):
                yield "pairs", f"{str(self.pairs)!r} is a folder without a {SUFFIX} file"
        elif (message := file_problem(self.pairs)) is not None:
            yield "pairs", message
        yield from image_dir_problems(self)

    def to_scan(self, divisor: int) -> Sequence[ImageSource]:
        return [*pair_sources(self.model_copy(update={"tolerance": 1.0}), divisor).values()]


class ShapesPairData(PairFiles):
    """Pairs of rendered Shapes: what the prompt asks for, and something else of the same kind of task."""

    type: Literal["shapes_pairs"] = "shapes_pairs"
    pairs: Annotated[int, Field(gt=0, le=10_000_000)]
    """Number of pairs to render."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the scenes: equal seeds render equal pairs."""
    workers: Annotated[int, Field(ge=0, le=MAX_WORKERS), FREE] = 0
    """Processes that decode images ahead; with 0 the training process decodes. It changes speed only."""

    def build(self, folder: Path) -> PairList:
        from posttrain.shapes.pairs import build_pairs  # only stages that train on shapes need the renderer

        folder = folder / f"shapes-pairs-{self.pairs}-{self.seed}"
        build_pairs(folder, self.pairs, self.seed)
        return PairList(pairs=folder / "pairs.jsonl", image_dir=folder / "images", workers=self.workers)

    def facts(self, path: str) -> Facts:
        return Facts((SHAPES_SIDE, SHAPES_SIDE), self.pairs, 2 * self.pairs)

    def in_words(self) -> str:
        return f"{self.pairs} rendered pairs of Shapes"
