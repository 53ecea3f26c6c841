"""Which data can a recipe name, and with which options?

Imports nothing heavy: every command reads a recipe, most of them touch no image.
"""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator

from posttrain.registry import AnyPath, Named, Spec


class Data(Named, ABC):
    """The ``data`` block of a stage."""


class Images(Data):
    """Images with captions, listed by a JSONL file."""

    type: Literal["images"] = "images"
    images: AnyPath
    """JSONL, one object a line: ``md5``, ``caption_en``, ``bw``, ``bh`` (the image is ``{md5}.jpg``), or
    ``image`` (a path) and ``caption``."""
    image_dir: AnyPath | None = None
    """Folder that the rows' images are in; by default the folder of the JSONL file."""
    resolution: Annotated[int, Field(gt=0)] | None = None
    """Side in pixels of the square of equal area: each image goes to the bucket of that area whose aspect
    ratio is nearest. Without it each row names its bucket, ``bw`` x ``bh`` pixels."""
    crop: Literal["random", "center"] = "random"
    """Which part is kept where the image's aspect ratio is not its bucket's."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2, drawn anew each epoch."""
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Fraction of the rows that may be skipped because they cannot be used; one more stops the run."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode images; 0: the training process does. Never changes what is drawn."""
    max_pixels: Annotated[int, Field(gt=0)] = 178_956_970
    """An image of more pixels is refused before it is decoded (decompression bomb)."""

    def materialise(self, folder: Path) -> Images:
        """These images: they are there already, and ``folder`` is not used."""
        return self


class ShapesData(Data):
    """Scenes of coloured shapes with captions, rendered before the stage starts."""

    type: Literal["shapes"] = "shapes"
    images: Annotated[int, Field(gt=0)]
    """How many images are rendered."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which scenes: equal seeds render equal images."""
    style: Literal["clean", "web"] = "clean"
    """``clean`` renders what the caption says; ``web`` adds the flaws of images found on the web."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode images; 0: the training process does. Never changes what is drawn."""

    def materialise(self, folder: Path) -> Images:
        """The rendered images, in a folder of their own inside ``folder``, which stages may share.

        Call it on one process while the others wait.
        """
        from posttrain.shapes.dataset import build  # only a stage that trains on shapes needs the renderer

        folder = folder / f"shapes-{self.style}-{self.images}-{self.seed}"
        build(folder, self.images, self.seed, self.style)
        return Images(images=folder / "train.jsonl", image_dir=folder / "images", workers=self.workers)


Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]


class PromptFile(Spec):
    """Prompts listed in a file."""

    type: Literal["file"] = "file"
    path: AnyPath
    """Text, one prompt a line; or ``.jsonl``, one object with ``prompt`` a line, whose other keys go to the
    rewards (GenEval's metadata)."""


class ShapesPrompts(Spec):
    """Prompts of the Shapes world, balanced over its kinds of task.

    The world is so small that training meets most of its prompts; what is held out is the noise."""

    type: Literal["shapes"] = "shapes"
    count: int = Field(ge=1)
    seed: int = 0
    tasks: list[Task] = Field(default=[*get_args(Task)], min_length=1)
    """Which of GenEval's kinds."""

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


class PromptData(Data):
    """Prompts, for algorithms that make their own images."""

    type: Literal["prompts"] = "prompts"
    prompts: AnyPrompts
    """A file's path, or ``{type: shapes, count: N}``."""
    resolution: Annotated[int, Field(ge=8)] = 512
    """Side in pixels of the images that are made."""


def with_type(block: Any) -> Any:
    """``block`` with the ``type`` that its keys imply, where it gives none; any other value unchanged."""
    if not isinstance(block, dict) or "type" in block:
        return block
    if isinstance(block.get("images"), str | Path):
        return {"type": "images", **block}
    if "prompts" in block:
        return {"type": "prompts", **block}
    return block


AnyData = Annotated[
    Annotated[Images | ShapesData | PromptData, Field(discriminator="type")], BeforeValidator(with_type)
]
"""The type of a recipe's ``data`` field."""
