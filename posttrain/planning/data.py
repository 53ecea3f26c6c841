"""Finds what is known of a stage's data before a run: the largest image, how many prompts and images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.data.prompts import prompt_rows
from posttrain.data.rows import read_records
from posttrain.data.settings import Images, PromptData, ShapesData
from posttrain.errors import DataError, PosttrainError

if TYPE_CHECKING:
    from posttrain.data.settings import AnyPrompts, Data
    from posttrain.planning.counts import Counts, Size

SHAPES_SIDE = 64


@dataclass(frozen=True)
class Known:
    """What a plan knows of a stage's data. None means that the files are not on this machine."""

    size: Size
    """The size of the largest images."""
    prompts: int | None
    """At most how many distinct prompts there are."""
    images: int | None
    """At most how many distinct images there are; with ``flip`` a mirrored image counts too."""


def known(data: Data, counts: Counts, name: str) -> Known:
    """What is known of the ``data`` of stage ``name``. Raises PosttrainError if no size is known."""
    return counts.once(("data", data.model_dump_json()), lambda: _known(data, name))


def distinct_prompts(prompts: AnyPrompts) -> int | None:
    """How many distinct prompts there are; None if their file is not on this machine."""
    try:
        return len({row["prompt"] for row in prompt_rows(prompts)})
    except (OSError, PosttrainError):
        return None


def _known(data: Data, name: str) -> Known:
    if isinstance(data, PromptData):
        return Known((data.resolution, data.resolution), distinct_prompts(data.prompts), None)
    if isinstance(data, ShapesData):
        return Known((SHAPES_SIDE, SHAPES_SIDE), data.images, data.images)
    assert isinstance(data, Images), "there are no other kinds"
    return _known_images(data, name)


def _known_images(data: Images, name: str) -> Known:
    try:
        # the run applies the tolerance, not the plan
        records = read_records(data.model_copy(update={"tolerance": 1.0})).records
    except DataError as error:
        if data.resolution is None:
            reason = str(error).splitlines()[0]
            raise PosttrainError(
                f"stages.{name}.data.resolution: without it each row names the size of its image, and the "
                f"rows cannot be read here ({reason}): plan on the machine that has the data, or give one "
                f"size with --set stages.{name}.data.resolution=512"
            ) from error
        return Known((data.resolution, data.resolution), None, None)
    prompts = len({record.caption for record in records})
    images = len({record.path for record in records}) * (2 if data.flip else 1)
    if data.resolution is not None:
        return Known((data.resolution, data.resolution), prompts, images)
    if not (buckets := [record.bucket for record in records if record.bucket is not None]):
        raise PosttrainError(
            f"stages.{name}.data: no row of {str(data.images)!r} has 'bw' and 'bh': add them, or set "
            f"stages.{name}.data.resolution"
        )
    width, height = max(buckets, key=lambda bucket: bucket[0] * bucket[1])
    return Known((height, width), prompts, images)
