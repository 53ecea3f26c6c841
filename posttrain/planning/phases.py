"""What is held at which time of a stage, beside weights, optimizer and roles?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from posttrain.cache.latents import IMAGE_ENCODE_BATCH
from posttrain.cache.prompts import PROMPT_ENCODE_BATCH
from posttrain.engine.rehearsal import Calls, rehearse
from posttrain.model import EncoderName
from posttrain.planning.counts import Counts, Size
from posttrain.planning.data import known
from posttrain.planning.memory import Phase
from posttrain.stages.hooks.image_grids import SHOWN
from posttrain.stages.prepare import AUTOCAST

if TYPE_CHECKING:
    from posttrain.flow.sampling_settings import Sampling
    from posttrain.recipe.schema import Recipe, Stage

ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)


def phases_of(
    recipe: Recipe, stage: Stage, counts: Counts, devices: int, micro_batch: int
) -> Iterator[tuple[str, Phase]]:
    """Name -> what is held for a while."""
    train, calls, data = stage.train, calls_of(stage, counts), known(stage.data, counts, stage.name)
    dtype, size, evaluation = AUTOCAST[train.precision], data.size, recipe.evaluation
    batch = -(-train.batch_size // devices)
    chunk, in_step = min(micro_batch, batch), items_in_step(stage, counts, devices)
    prompts = batch // stage.algorithm.samples_per_prompt + 1
    cached = in_cache(recipe, stage)
    latent = math.prod(counts.outline().latent_shape(*size))
    items = batch * (calls.item_bytes[0] + calls.item_bytes[1] * latent)
    held = sum(t.nbytes for t in counts.condition(1).values()) * prompts + items
    if not (counts.cuda or calls.decoded or cached["images"]):
        # the batch's pixels, and they with what fills the batch up, stay in the CPU's memory till the next
        held += 2 * batch * 4 * 3 * math.prod(size)
    forward = counts.memory("forward", size, stage.tune, dtype)
    training = counts.memory("training", size, stage.tune, dtype, train.gradient_checkpointing)
    text = counts.memory("text", size)
    idle = there(recipe, counts, cached)

    if cached["prompts"]:
        most = PROMPT_ENCODE_BATCH
        distinct = most if data.prompts is None else min(most, data.prompts + 1)
        # a run that goes on has its moments by then
        yield "fill prompts", Phase(text.at(distinct), encoders=there(recipe, counts, {}, "prompts"))
    else:
        yield "text", Phase(text.at(prompts), encoders=there(recipe, counts, cached, "prompts"))
    images = there(recipe, counts, cached, "images")
    if cached["images"]:
        yield "fill latents", Phase(counts.autoencoder("encode", size, IMAGE_ENCODE_BATCH), encoders=images)
    elif not calls.decoded:
        activations = counts.autoencoder("encode", size, batch)
        yield "encoding", Phase(activations, 4.0 * batch * latent, encoders=images)
    if calls.rollout:
        yield (
            "rollout",
            Phase(forward.at(chunk * calls.rows_without), held, encoders=idle, forward=True),
        )
    # what autocast makes of whole weights stays for as long as they do not change (Policy.steady)
    whole = dtype is not None and not recipe.parallel.shares(devices).gathers
    lowered = 2.0 * trained_numbers(stage, counts) if whole else 0.0
    if calls.decoded:
        decoding = counts.autoencoder("decode", size, chunk) + lowered
        yield "decoding", Phase(decoding, held, encoders=images)
    rows = min(micro_batch, in_step) * calls.rows_with
    # a block that is computed again at the end of a backward has all blocks' gradients beside it
    already = in_step > micro_batch or train.gradient_checkpointing == "full"
    yield "training", Phase(training.at(rows), held, already, idle, forward=True, backward=True)
    yield "backward's end", Phase(lowered, held, gradients=True, encoders=idle)
    yield "optimizer", Phase(0.0, held, gradients=True, encoders=idle)
    shown = size if evaluation is None else square(evaluation)
    looked = [SHOWN] if train.sample_every else []
    if stage.monitor is not None and evaluation is not None:
        looked.append(min(evaluation.batch_size, stage.monitor.prompts))
    if looked:
        branches = 2 if evaluation is None else branches_of(evaluation)
        rows = min(micro_batch, max(looked)) * branches
        drawn = counts.memory("forward", shown, stage.tune, dtype).at(rows)
        yield "image grids", Phase(drawn, encoders=idle, forward=True)
        yield "grids' decoding", Phase(counts.autoencoder("decode", shown, max(looked)), encoders=images)


def in_cache(recipe: Recipe, stage: Stage) -> dict[EncoderName, bool]:
    """Whether a stage finds in the cache what an encoder makes."""
    images = recipe.cache.latents != "off" and stage.algorithm.needs == "images"
    return {"prompts": recipe.cache.prompts, "images": images}


def at_rest(recipe: Recipe, counts: Counts, cached: dict[EncoderName, bool]) -> frozenset[EncoderName]:
    """The encoders in the CPU's memory, but for while they work, once some is ``cached``."""
    rests = recipe.model.rests
    return frozenset(e for e in ENCODERS if counts.cuda and rests(e, cached=cached.get(e, False)))


def there(
    recipe: Recipe, counts: Counts, cached: dict[EncoderName, bool], *working: EncoderName
) -> frozenset[EncoderName]:
    """The encoders on the device while those ``working`` do so."""
    return frozenset(ENCODERS) - at_rest(recipe, counts, cached) | frozenset(working)


def calls_of(stage: Stage, counts: Counts) -> Calls:
    """How the stage's algorithm calls the model."""
    return counts.once(
        ("calls", stage.algorithm.type, stage.algorithm.model_dump_json()), lambda: rehearse(stage.algorithm)
    )


def items_in_step(stage: Stage, counts: Counts, devices: int) -> int:
    """The items in one optimizer step of one device."""
    batch = -(-stage.train.batch_size // devices)
    return max(int(batch * calls_of(stage, counts).items) // stage.train.steps_per_batch, 1)


def trained_numbers(stage: Stage, counts: Counts) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in counts.outline(stage.tune).transformer.parameters() if p.requires_grad)


def square(sampling: Sampling) -> Size:
    """(height, width) of the images drawn."""
    return sampling.resolution, sampling.resolution


def branches_of(sampling: Sampling) -> int:
    """Forwards of a sampling step."""
    return 1 if sampling.guidance == 1 else 2
