"""What is known of data before a run: the largest image, how many prompts and images, the size of a cache?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.data.prompts import prompt_rows
from posttrain.data.rows import read_records
from posttrain.data.settings import Images, PromptData, ShapesData
from posttrain.errors import DataError, PosttrainError
from posttrain.planning.outline import kept_bytes

if TYPE_CHECKING:
    from posttrain.data.settings import AnyPrompts, Data
    from posttrain.planning.counts import Counts, Size
    from posttrain.recipe.schema import Recipe

SHAPES_SIDE = 64


@dataclass(frozen=True)
class Known:
    """What a plan can know of data; None is unknown, since the files are not here."""

    size: Size
    """Of the largest images."""
    prompts: int | None
    """Distinct ones, at most."""
    images: int | None
    """The same, mirrored ones included where the data is flipped."""


def known(data: Data, counts: Counts, name: str) -> Known:
    """What is known of the ``data`` of stage ``name``. Raises PosttrainError where not even a size is."""
    return counts.once(("data", data.model_dump_json()), lambda: _known(data, name))


def cache_bytes(recipe: Recipe, counts: Counts) -> float | None:
    """What the recipe's cache takes of the disk, at most; None where that is not known here."""
    total, outline = 0.0, counts.outline()
    # stages of equal data share what is kept
    stages = {stage.data.model_dump_json(): stage for stage in recipe.stages}
    for stage in stages.values():
        data = known(stage.data, counts, stage.name)
        side = round((data.size[0] * data.size[1]) ** 0.5)
        if recipe.cache.prompts:
            total += _times(data.prompts, kept_bytes(recipe, outline, "prompts", side))
        if recipe.cache.latents != "off" and not isinstance(stage.data, PromptData):
            total += _times(data.images, kept_bytes(recipe, outline, "images", side))
    if recipe.cache.prompts and recipe.evaluation is not None:
        total += _times(_distinct(recipe.evaluation.prompts), kept_bytes(recipe, outline, "prompts", 0))
    return None if math.isnan(total) else total


def _times(count: int | None, size: float) -> float:
    return math.nan if count is None else count * size


def _distinct(prompts: AnyPrompts) -> int | None:
    try:
        return len({row["prompt"] for row in prompt_rows(prompts)})
    except (OSError, PosttrainError):
        return None


def _known(data: Data, name: str) -> Known:
    if isinstance(data, PromptData):
        return Known((data.resolution, data.resolution), _distinct(data.prompts), None)
    if isinstance(data, ShapesData):
        return Known((SHAPES_SIDE, SHAPES_SIDE), data.images, data.images)
    assert isinstance(data, Images), "there are no other kinds"
    return _known_images(data, name)


def _known_images(data: Images, name: str) -> Known:
    try:
        # how many rows are bad is for the run to judge
        records = read_records(data.model_copy(update={"tolerance": 1.0})).records
    except DataError as error:
        if data.resolution is None:
            reason = str(error).splitlines()[0]
            raise PosttrainError(
                f"stages.{name}.data.resolution: without it each row names the size of its image, and they "
                f"cannot be read here ({reason}): plan where the data is, or --set "
                f"stages.{name}.data.resolution=512 for a plan of that size"
            ) from error
        return Known((data.resolution, data.resolution), None, None)
    prompts = len({record.caption for record in records})
    images = len({record.path for record in records}) * (2 if data.flip else 1)
    if data.resolution is not None:
        return Known((data.resolution, data.resolution), prompts, images)
    if not (buckets := [record.bucket for record in records if record.bucket is not None]):
        raise PosttrainError(
            f"stages.{name}.data: no row of {str(data.images)!r} has 'bw' and 'bh'; add them, or give the "
            "recipe's data a 'resolution'"
        )
    width, height = max(buckets, key=lambda bucket: bucket[0] * bucket[1])
    return Known((height, width), prompts, images)
