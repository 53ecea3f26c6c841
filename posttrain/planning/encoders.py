"""Says which encoders are on the device in a phase of a stage: what is cached rests, or is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from posttrain.model import EncoderName
from posttrain.planning.counts import Counts
from posttrain.planning.memory import Phase

if TYPE_CHECKING:
    from posttrain.recipe.schema import Recipe, Stage

ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)


def in_cache(recipe: Recipe, stage: Stage) -> dict[EncoderName, bool]:
    """Whether the cache has each encoder's outputs while the stage trains."""
    images = recipe.cache.latents != "off" and stage.data.images_per_sample > 0
    return {"prompts": recipe.cache.prompts, "images": images}


def at_rest(recipe: Recipe, counts: Counts, cached: dict[EncoderName, bool]) -> frozenset[EncoderName]:
    """The encoders that are in the CPU's memory except while they work, given whose outputs are
    ``cached``."""
    rests = recipe.model.rests
    return frozenset(e for e in ENCODERS if counts.cuda and rests(e, cached=cached.get(e, False)))


def on_device(
    recipe: Recipe, counts: Counts, cached: dict[EncoderName, bool], *working: EncoderName
) -> frozenset[EncoderName]:
    """The encoders on the device while those in ``working`` work."""
    return frozenset(ENCODERS) - at_rest(recipe, counts, cached) | frozenset(working)


def text_phase(recipe: Recipe, counts: Counts, cached: dict[EncoderName, bool], activations: float) -> Phase:
    """The encoding of prompts, given whose outputs are ``cached``."""
    there = on_device(recipe, counts, cached)
    if "prompts" in there:
        return Phase(activations, encoders=there)
    return Phase(activations, encoders=there, visiting=counts.bytes_at_work("prompts"))
