"""The ``data`` and ``prompts`` blocks of a recipe.

Nothing heavy is imported: every command reads a recipe, and most commands touch no image.
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
    """Images with captions, listed in a JSONL file."""

    type: Literal["images"] = "images"
    images: AnyPath
    """JSONL file with one object per line: either ``md5`` (the image is ``{md5}.jpg``), ``caption_en``,
    ``bw`` and ``bh``, or ``image`` (a path) and ``caption``."""
    image_dir: AnyPath | None = None
    """Folder of the images. Default: the folder of the JSONL file."""
    resolution: Annotated[int, Field(gt=0)] | None = None
    """Training area, as the side in pixels of a square. Each image is trained at the size of about this area
    whose aspect ratio is nearest to its own. Default: each row names its size, ``bw`` x ``bh`` pixels."""
    crop: Literal["random", "center"] = "random"
    """Part of an image that is kept if its aspect ratio differs from its training size's. ``random`` draws
    a part in each epoch."""
    flip: bool = False
    """Whether to mirror each image left to right with probability 1/2, drawn in each epoch."""
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Fraction of the rows, 0 to 1, that may be skipped because they cannot be used. More stop the run."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode images ahead; with 0 the training process decodes. It changes speed only."""
    max_pixels: Annotated[int, Field(gt=0)] = 178_956_970
    """Largest image in pixels. A larger one is refused before it is decoded, as it may be a decompression
    bomb. Default: the limit beyond which Pillow refuses to open an image."""

    def build(self, folder: Path) -> Images:
        """Return these images, which exist already; ``folder`` is not used."""
        return self


class ShapesData(Data):
    """Scenes of coloured shapes with captions, rendered before the stage starts."""

    type: Literal["shapes"] = "shapes"
    images: Annotated[int, Field(gt=0)]
    """Number of images to render."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the scenes: equal seeds render equal images."""
    style: Literal["clean", "web"] = "clean"
    """``clean`` renders what the caption says; ``web`` adds flaws that images on the web have."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode images ahead; with 0 the training process decodes. It changes speed only."""

    def build(self, folder: Path) -> Images:
        """Render the images into a subfolder of ``folder``, unless it has them; stages share the subfolder.

        Only one process may call this at a time. Raises DataError if the folder cannot be written.
        """
        from posttrain.shapes.dataset import build  # only stages that train on shapes need the renderer

        folder = folder / f"shapes-{self.style}-{self.images}-{self.seed}"
        build(folder, self.images, self.seed, self.style)
        return Images(images=folder / "train.jsonl", image_dir=folder / "images", workers=self.workers)


Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]


class PromptFile(Spec):
    """Prompts that a file lists."""

    type: Literal["file"] = "file"
    path: AnyPath
    """Text file with one prompt per line, or ``.jsonl`` file with one object per line: its ``prompt``, and
    metadata that the rewards read, such as GenEval's."""


class ShapesPrompts(Spec):
    """Prompts of the Shapes data set, spread evenly over the tasks.

    Training also meets most of these prompts, since there are few. Only the noise is held out."""

    type: Literal["shapes"] = "shapes"
    count: int = Field(ge=1)
    """Number of prompts."""
    seed: int = 0
    """Seed of the prompts."""
    tasks: list[Task] = Field(default=[*get_args(Task)], min_length=1)
    """GenEval's tasks to take prompts of. Default: all six."""

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
    """Prompts, for algorithms that train on their own samples."""

    type: Literal["prompts"] = "prompts"
    prompts: AnyPrompts
    """Prompts to sample images for: a file's path, or ``{type: shapes, count: N}``."""
    resolution: Annotated[int, Field(ge=8)] = 512
    """Side of the sampled images in pixels; they are square."""


def with_type(block: Any) -> Any:
    """``block`` with the ``type`` that its keys imply, if it has none. Other values are unchanged."""
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
