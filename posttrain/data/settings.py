"""How a recipe names images and prompts: the fields that its ``data`` and ``prompts`` blocks share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from posttrain.flow.sampling_settings import MAX_SIDE
from posttrain.registry import FREE, NO_PATH, AnyPath, MaybePath, Spec, field_error

MAX_WORKERS = 256


class Reading(Spec):
    """How listed images are found and made ready for training."""

    image_dir: MaybePath = NO_PATH
    """Folder that paths of images start at. Default: the folder of the list or table."""
    resolution: Annotated[int, Field(gt=0, le=MAX_SIDE)] | None = None
    """Training area, as the side in pixels of a square. Each image is trained at the size of about this area
    whose aspect ratio is nearest to its own. Default: each row names its size, ``bw`` x ``bh`` pixels."""
    crop: Literal["random", "center"] = "random"
    """Part of an image that is kept if its aspect ratio differs from its training size's. ``random`` draws
    a part in each epoch."""
    flip: bool = False
    """Whether to mirror each image left to right with probability 1/2, drawn in each epoch."""
    tolerance: Annotated[float, Field(ge=0, le=1), FREE] = 0.01
    """Fraction of the rows, 0 to 1, that may be skipped because they cannot be used. More stop the run."""
    workers: Annotated[int, Field(ge=0, le=MAX_WORKERS), FREE] = 0
    """Processes that decode images ahead; with 0 the training process decodes. It changes speed only."""
    max_pixels: Annotated[int, Field(gt=0)] = 178_956_970
    """Largest image in pixels. A larger one is refused before it is decoded, as it may be a decompression
    bomb. Default: the limit beyond which Pillow refuses to open an image."""

    def for_cache(self) -> dict[str, str]:
        """The fields with which every image has one crop, as the cache of latents needs."""
        return {} if self.crop == "center" else {"crop": "center"}


class Images(Reading):
    """Images with captions, as they lie in a folder, an archive, a table, a list, or on the hub."""

    images: AnyPath
    """What holds or lists the images. A folder: images with ``.txt`` captions of the same stem, or with a
    ``metadata.jsonl`` or ``metadata.csv``, or ``.parquet`` or ``.tar`` files. A file: ``.jsonl``, ``.csv``,
    ``.parquet`` or ``.tar``. With ``split``: a data set's hub name, or its folder. See docs/data.md."""
    image_column: str | None = None
    """Column that names or holds the image; of ``.tar`` files, the ending. Default: found by its usual
    names."""
    caption_column: str | None = None
    """Column of the caption. Default: found by its usual names."""
    split: str | None = Field(default=None, pattern=r"^\w[\w.-]*$", examples=["train"])
    """Split of a data set that the library ``datasets`` reads, such as ``train``."""
    subset: str | None = None
    """Subset (configuration) of that data set. Default: its only one."""

    @model_validator(mode="after")
    def _subset_is_used(self) -> Self:
        if self.subset is not None and self.split is None:
            raise field_error(("subset",), "it has no effect without 'split', which asks for a data set")
        return self


class PairList(Reading):
    """Pairs of images of one prompt, of which one was preferred, in a list or in tables."""

    pairs: AnyPath
    """JSONL file with one object per line: ``prompt``, and ``chosen`` and ``rejected``, the paths of two
    images; ``bw`` and ``bh`` too where there is no ``resolution``. Or a ``.parquet`` file, or a folder of
    them, as Pick-a-Pic v2 has: ``caption``, ``jpg_0``, ``jpg_1``, ``label_0``, ``label_1``."""


Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]


class PromptFile(Spec):
    """Prompts that a file lists."""

    type: Literal["file"] = "file"
    path: AnyPath
    """Text file with one prompt per line, or ``.jsonl`` file with one object per line: its ``prompt``, and
    metadata that the rewards read, such as GenEval's."""

    def in_words(self) -> str:
        """The prompts in a few words."""
        return str(self.path)


class ShapesPrompts(Spec):
    """Prompts of the Shapes data set, spread evenly over the tasks.

    Training also meets most of these prompts, since there are few. Only the noise is held out."""

    type: Literal["shapes"] = "shapes"
    count: int = Field(ge=1, le=100_000)
    """Number of prompts."""
    seed: int = Field(default=0, ge=0)
    """Seed of the prompts."""
    tasks: list[Task] = Field(default=[*get_args(Task)], min_length=1)
    """GenEval's tasks to take prompts of. Default: all six."""

    def in_words(self) -> str:
        """The prompts in a few words."""
        return f"{self.count} Shapes prompts"

    @field_validator("tasks")
    @classmethod
    def _no_task_twice(cls, tasks: list[str]) -> list[str]:
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"{', '.join(sorted({t for t in tasks if tasks.count(t) > 1}))} is given twice")
        return tasks


AnyPrompts = Annotated[
    Annotated[PromptFile | ShapesPrompts, Field(discriminator="type")],
    BeforeValidator(lambda v: {"type": "file", "path": v} if isinstance(v, str | Path) else v),
]
"""The type of a recipe's ``prompts`` field: a file's path, or a block."""
