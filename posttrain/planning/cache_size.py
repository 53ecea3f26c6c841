"""Counts the bytes of cached encodings: one prompt, one image, and a recipe's whole cache."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from posttrain.data.prompts import distinct_prompts
from posttrain.planning.data import known

if TYPE_CHECKING:
    from posttrain.model import EncoderName
    from posttrain.planning.counts import Counts
    from posttrain.recipe.schema import Recipe


def cache_bytes(recipe: Recipe, counts: Counts) -> float | None:
    """The most bytes that the recipe's cache takes; None if some data are not on this machine."""
    total = 0.0
    # stages with equal data share their encodings
    stages = {stage.data.model_dump_json(): stage for stage in recipe.stages}
    for stage in stages.values():
        data = known(stage.data, counts, stage.name)
        side = round((data.size[0] * data.size[1]) ** 0.5)
        if recipe.cache.prompts:
            total += _times(data.prompts, kept_bytes(recipe, counts, "prompts", side))
        if recipe.cache.latents != "off" and stage.data.images_per_sample:
            total += _times(data.images, kept_bytes(recipe, counts, "images", side))
    if recipe.cache.prompts and recipe.evaluation is not None:
        total += _times(distinct_prompts(recipe.evaluation.prompts), kept_bytes(recipe, counts, "prompts", 0))
    return None if math.isnan(total) else total


def kept_bytes(recipe: Recipe, counts: Counts, encoder: EncoderName, side: int) -> float:
    """The bytes that the cache keeps of one prompt, or of one image of ``side`` x ``side`` pixels."""
    size = encoding_bytes(counts, encoder, side)
    # latents are always computed in float32; half-precision prompts are half as large already
    rounded = recipe.cache.dtype == "bf16" and (encoder == "images" or recipe.model.frozen_dtype() == "fp32")
    halvings = rounded + (encoder == "images" and recipe.cache.latents == "sampled")
    return size / 2**halvings


def encoding_bytes(counts: Counts, encoder: EncoderName, side: int) -> int:
    """The bytes of one prompt's condition, or of the posterior (mean and log-variance) of one image of
    ``side`` x ``side`` pixels, in the precision in which they are computed."""
    if encoder == "images":
        return 2 * 4 * math.prod(counts.latent_shape((side, side)))
    return counts.condition_bytes()


def _times(count: int | None, size: float) -> float:
    return math.nan if count is None else count * size
