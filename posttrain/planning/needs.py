"""What does a stage, or the evaluation, need: memory on each device, and how many FLOPs?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from posttrain.cache.latents import AT_ONCE as IMAGES_AT_ONCE
from posttrain.cache.prompts import AT_ONCE as PROMPTS_AT_ONCE
from posttrain.data.prompts import prompt_rows
from posttrain.errors import PosttrainError
from posttrain.model import EncoderName
from posttrain.parallel.fsdp2 import blocks
from posttrain.parallel.shares import Shares
from posttrain.plan import disk_bytes
from posttrain.planning.counts import Counts, Size
from posttrain.planning.data import known
from posttrain.planning.memory import Memory, Phase, Sizes, memory, moment_bytes
from posttrain.planning.rehearsal import Calls, rehearse
from posttrain.stage import AUTOCAST
from posttrain.trainer import REFERENCE
from posttrain.watch import SHOWN

if TYPE_CHECKING:
    from posttrain.recipe import Evaluation, Recipe, Sampling, Stage
    from posttrain.reward import Reward

CHUNK = 64
"""Most rows in one forward of an evaluation, the default of :class:`posttrain.policy.Policy`."""
ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)


@dataclass(frozen=True)
class Work:
    """FLOPs by the precision that they are computed in."""

    low: float = 0.0
    """In bf16."""
    full: float = 0.0
    """In float32, or TF32 where the recipe allows it."""

    def __add__(self, other: Work) -> Work:
        return Work(self.low + other.low, self.full + other.full)

    def __mul__(self, times: float) -> Work:
        return Work(self.low * times, self.full * times)


@dataclass(frozen=True)
class Needs:
    """What something needs."""

    name: str
    memory: Memory
    rollout: Work
    """Of forwards that train nothing: making images to learn from, to look at, or to be compared."""
    training: Work
    disk: float = 0.0
    found: int | None = None
    """The ``micro_batch`` that is planned with, where the recipe leaves it to the run."""

    @property
    def work(self) -> Work:
        return self.rollout + self.training


def stage_needs(
    recipe: Recipe, stage: Stage, counts: Counts, devices: int = 1, limit: float = math.inf
) -> Needs:
    """What ``stage`` needs, text encoders, autoencoder, held-out scores and image grids included. Rewards'
    networks are counted in memory, by the size of their files, and not in FLOPs.

    ``micro_batch: auto`` is the largest power of two with which a device needs at most ``limit`` bytes.
    """
    sizes, shares = _sizes(recipe, stage, counts), recipe.parallel.shares(devices)
    resting = _resting(recipe, counts, _cached(recipe, stage))

    def needed(micro_batch: int) -> Memory:
        phases = dict(_phases(recipe, stage, counts, devices, micro_batch))
        return memory(sizes, phases, shares, resting, separate=counts.cuda)

    given, found = stage.train.micro_batch, None
    if given == "auto":
        found, most = 1, _in_step(stage, counts, devices)
        while 2 * found <= most and needed(2 * found).total <= limit:
            found *= 2
    rollout, trained = _work(recipe, stage, counts)
    disk = disk_bytes(stage, sizes.trained)
    return Needs(stage.name, needed(found or int(given)), rollout, trained, disk, found)


def evaluation_needs(recipe: Recipe, evaluation: Evaluation, counts: Counts) -> Needs:
    """What evaluating the base model and every stage needs."""
    size, rows = _square(evaluation), min(CHUNK, evaluation.batch_size)
    forward = counts.memory("forward", size, None, AUTOCAST[evaluation.precision])
    at_once = PROMPTS_AT_ONCE if recipe.cache.prompts else evaluation.batch_size + 1
    cached: dict[EncoderName, bool] = {"prompts": recipe.cache.prompts}
    phases = {
        "sampling": Phase(forward.at(rows * _branches(evaluation)), encoders=_there(recipe, counts, cached)),
        "decoding": Phase(
            counts.autoencoder("decode", size, evaluation.batch_size),
            encoders=_there(recipe, counts, cached, "images"),
        ),
        "text": Phase(
            counts.memory("text", size).at(at_once), encoders=_there(recipe, counts, {}, "prompts")
        ),
    }
    outline = counts.outline()
    weights = sum(p.nbytes for p in outline.transformer.parameters())
    sizes = Sizes(0, weights, 0, 0, _reward_bytes(evaluation.rewards), _encoder_bytes(counts))
    found = memory(sizes, phases, Shares(), _resting(recipe, counts, cached), separate=counts.cuda)
    try:
        prompts = len(prompt_rows(evaluation.prompts))
    except (OSError, PosttrainError):
        prompts = 0  # a plan may be made where the prompts are not
    times = 1 + len(recipe.stages)
    encoded = prompts * (1 if recipe.cache.prompts else times)
    work = _images(counts, evaluation) * (prompts * evaluation.images_per_prompt * times)
    return Needs("evaluation", found, work + Work(low=counts.flops("text", size)) * encoded, Work())


def _phases(
    recipe: Recipe, stage: Stage, counts: Counts, devices: int, micro_batch: int
) -> Iterator[tuple[str, Phase]]:
    """Name -> what is held for a while."""
    train, calls, data = stage.train, _calls(stage, counts), known(stage.data, counts, stage.name)
    dtype, size, evaluation = AUTOCAST[train.precision], data.size, recipe.evaluation
    batch = -(-train.batch_size // devices)
    chunk, in_step = min(micro_batch, batch), _in_step(stage, counts, devices)
    prompts = batch // stage.algorithm.samples_per_prompt + 1
    cached = _cached(recipe, stage)
    latent = math.prod(counts.outline().latent_shape(*size))
    items = batch * (calls.item_bytes[0] + calls.item_bytes[1] * latent)
    held = sum(t.nbytes for t in counts.condition(1).values()) * prompts + items
    if not (counts.cuda or calls.decoded or cached["images"]):
        # the batch's pixels, and they with what fills the batch up, stay in the CPU's memory till the next
        held += 2 * batch * 4 * 3 * math.prod(size)
    forward = counts.memory("forward", size, stage.tune, dtype)
    training = counts.memory("training", size, stage.tune, dtype, train.gradient_checkpointing)
    text = counts.memory("text", size)
    idle = _there(recipe, counts, cached)

    if cached["prompts"]:
        distinct = PROMPTS_AT_ONCE if data.prompts is None else min(PROMPTS_AT_ONCE, data.prompts + 1)
        # a run that goes on has its moments by then
        yield "fill prompts", Phase(text.at(distinct), encoders=_there(recipe, counts, {}, "prompts"))
    else:
        yield "text", Phase(text.at(prompts), encoders=_there(recipe, counts, cached, "prompts"))
    images = _there(recipe, counts, cached, "images")
    if cached["images"]:
        yield "fill latents", Phase(counts.autoencoder("encode", size, IMAGES_AT_ONCE), encoders=images)
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
    lowered = 2.0 * _trained(stage, counts) if whole else 0.0
    if calls.decoded:
        decoding = counts.autoencoder("decode", size, chunk) + lowered
        yield "decoding", Phase(decoding, held, encoders=images)
    rows = min(micro_batch, in_step) * calls.rows_with
    # a block that is computed again at the end of a backward has all blocks' gradients beside it
    already = in_step > micro_batch or train.gradient_checkpointing == "full"
    yield "training", Phase(training.at(rows), held, already, idle, forward=True, backward=True)
    yield "backward's end", Phase(lowered, held, gradients=True, encoders=idle)
    yield "optimizer", Phase(0.0, held, gradients=True, encoders=idle)
    shown = size if evaluation is None else _square(evaluation)
    looked = [SHOWN] if train.sample_every else []
    if stage.monitor is not None and evaluation is not None:
        looked.append(min(evaluation.batch_size, stage.monitor.prompts))
    if looked:
        branches = 2 if evaluation is None else _branches(evaluation)
        rows = min(micro_batch, max(looked)) * branches
        drawn = counts.memory("forward", shown, stage.tune, dtype).at(rows)
        yield "image grids", Phase(drawn, encoders=idle, forward=True)
        yield "grids' decoding", Phase(counts.autoencoder("decode", shown, max(looked)), encoders=images)


def _cached(recipe: Recipe, stage: Stage) -> dict[EncoderName, bool]:
    """Whether a stage finds in the cache what an encoder makes."""
    images = recipe.cache.latents != "off" and stage.algorithm.needs == "images"
    return {"prompts": recipe.cache.prompts, "images": images}


def _resting(recipe: Recipe, counts: Counts, cached: dict[EncoderName, bool]) -> frozenset[EncoderName]:
    """The encoders in the CPU's memory, but for while they work, once some is ``cached``."""
    rests = recipe.model.rests
    return frozenset(e for e in ENCODERS if counts.cuda and rests(e, cached=cached.get(e, False)))


def _there(
    recipe: Recipe, counts: Counts, cached: dict[EncoderName, bool], *working: EncoderName
) -> frozenset[EncoderName]:
    """The encoders on the device while those ``working`` do so."""
    return frozenset(ENCODERS) - _resting(recipe, counts, cached) | frozenset(working)


def _calls(stage: Stage, counts: Counts) -> Calls:
    return counts.once(
        ("calls", stage.algorithm.type, stage.algorithm.model_dump_json()), lambda: rehearse(stage.algorithm)
    )


def _in_step(stage: Stage, counts: Counts, devices: int) -> int:
    """The items in one optimizer step of one device."""
    batch = -(-stage.train.batch_size // devices)
    return max(int(batch * _calls(stage, counts).items) // stage.train.steps_per_batch, 1)


def _work(recipe: Recipe, stage: Stage, counts: Counts) -> tuple[Work, Work]:
    train, calls, data = stage.train, _calls(stage, counts), known(stage.data, counts, stage.name)
    size, samples = data.size, train.steps * train.batch_size / train.steps_per_batch
    forward = _transformer(counts, size, train.precision)
    prompts = samples / stage.algorithm.samples_per_prompt
    if _cached(recipe, stage)["prompts"] and data.prompts is not None:
        prompts = min(prompts, data.prompts)
    encoded = samples
    if _cached(recipe, stage)["images"] and data.images is not None:
        encoded = min(samples, data.images)
    made = forward * (calls.rollout * samples) + Work(low=counts.flops("text", size) * prompts)
    if calls.decoded:
        made += Work(full=counts.flops("decode", size) * samples)
    else:
        made += Work(full=counts.flops("encode", size) * encoded)
    # selective checkpointing computes nearly no FLOPs again
    again = 1 if train.gradient_checkpointing == "full" else 0
    trained = forward * ((calls.frozen + calls.training * (3 + again)) * samples)
    if (evaluation := recipe.evaluation) is not None:
        each = _images(counts, evaluation.model_copy(update={"precision": train.precision}))
        if stage.monitor is not None:
            made += each * ((train.steps // stage.monitor.every + 1) * stage.monitor.prompts)
        if train.sample_every:
            made += each * ((train.steps // train.sample_every + 1) * SHOWN)
    return made, trained


def _images(counts: Counts, sampling: Sampling) -> Work:
    """Of one image."""
    forward = _transformer(counts, _square(sampling), sampling.precision)
    decoded = Work(full=counts.flops("decode", _square(sampling)))
    return forward * (_branches(sampling) * sampling.steps) + decoded


def _square(sampling: Sampling) -> Size:
    return sampling.resolution, sampling.resolution


def _branches(sampling: Sampling) -> int:
    return 1 if sampling.guidance == 1 else 2


def _transformer(counts: Counts, size: Size, precision: str) -> Work:
    one = counts.flops("forward", size)
    return Work(low=one) if precision == "bf16" else Work(full=one)


def _trained(stage: Stage, counts: Counts) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in counts.outline(stage.tune).transformer.parameters() if p.requires_grad)


def _sizes(recipe: Recipe, stage: Stage, counts: Counts) -> Sizes:
    outline = counts.outline(stage.tune)
    parameters = list(outline.transformer.parameters())
    trained = [p for p in parameters if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
    roles = 4 * numbers * (len(stage.algorithm.roles) + (stage.train.ema is not None))
    if REFERENCE in stage.algorithm.roles and stage.reference not in (None, recipe.parent(stage)):
        roles += frozen if stage.tune.type == "lora" else 0
    rewards = list(stage.rewards)
    if stage.monitor is not None and recipe.evaluation is not None:
        rewards += recipe.evaluation.rewards
    every = [list(block.parameters()) for block in blocks(outline.transformer)]
    largest = max(every, key=lambda block: sum(p.nbytes for p in block), default=[])
    inside = {id(p) for block in every for p in block}
    at_once = [p for p in parameters if id(p) not in inside] + 2 * largest
    return Sizes(
        numbers,
        frozen,
        moment_bytes(stage.train.optimizer, trained),
        roles,
        _reward_bytes(rewards),
        _encoder_bytes(counts),
        sum(p.nbytes for p in at_once),
        sum(p.nbytes for p in at_once if p.requires_grad),
    )


def _encoder_bytes(counts: Counts) -> dict[EncoderName, int]:
    outline = counts.outline()
    return {
        encoder: sum(p.nbytes for module in outline.encoder_modules(encoder) for p in module.parameters())
        for encoder in ENCODERS
    }


def _reward_bytes(rewards: Iterable[Reward]) -> int:
    files = {getattr(r, name): weights.size for r in rewards for name, weights in r.weights.items()}
    return sum(files.values())
