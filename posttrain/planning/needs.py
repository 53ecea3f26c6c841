"""What does a stage, or the evaluation, need: memory on each device, and how many FLOPs?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.cache.prompts import PROMPT_ENCODE_BATCH
from posttrain.data.prompts import prompt_rows
from posttrain.engine.trainer import REFERENCE
from posttrain.errors import PosttrainError
from posttrain.model import EncoderName
from posttrain.parallel.shares import Shares
from posttrain.planning.counts import Counts
from posttrain.planning.memory import Memory, Phase, Sizes, memory, moment_bytes
from posttrain.planning.outline import disk_bytes
from posttrain.planning.phases import (
    ENCODERS,
    at_rest,
    branches_of,
    in_cache,
    items_in_step,
    phases_of,
    square,
    there,
)
from posttrain.planning.work import Work, image_work, stage_work
from posttrain.policy.blocks import blocks
from posttrain.stages.prepare import AUTOCAST

if TYPE_CHECKING:
    from posttrain.recipe.schema import Evaluation, Recipe, Stage
    from posttrain.reward import Reward

CHUNK = 64
"""Most rows in one forward of an evaluation, the default of :class:`posttrain.policy.policy.Policy`."""


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
    resting = at_rest(recipe, counts, in_cache(recipe, stage))

    def needed(micro_batch: int) -> Memory:
        phases = dict(phases_of(recipe, stage, counts, devices, micro_batch))
        return memory(sizes, phases, shares, resting, separate=counts.cuda)

    given, found = stage.train.micro_batch, None
    if given == "auto":
        found, most = 1, items_in_step(stage, counts, devices)
        while 2 * found <= most and needed(2 * found).total <= limit:
            found *= 2
    rollout, trained = stage_work(recipe, stage, counts)
    disk = disk_bytes(stage, sizes.trained)
    return Needs(stage.name, needed(found or int(given)), rollout, trained, disk, found)


def evaluation_needs(recipe: Recipe, evaluation: Evaluation, counts: Counts) -> Needs:
    """What evaluating the base model and every stage needs."""
    size, rows = square(evaluation), min(CHUNK, evaluation.batch_size)
    forward = counts.memory("forward", size, None, AUTOCAST[evaluation.precision])
    at_once = PROMPT_ENCODE_BATCH if recipe.cache.prompts else evaluation.batch_size + 1
    cached: dict[EncoderName, bool] = {"prompts": recipe.cache.prompts}
    phases = {
        "sampling": Phase(forward.at(rows * branches_of(evaluation)), encoders=there(recipe, counts, cached)),
        "decoding": Phase(
            counts.autoencoder("decode", size, evaluation.batch_size),
            encoders=there(recipe, counts, cached, "images"),
        ),
        "text": Phase(counts.memory("text", size).at(at_once), encoders=there(recipe, counts, {}, "prompts")),
    }
    outline = counts.outline()
    weights = sum(p.nbytes for p in outline.transformer.parameters())
    sizes = Sizes(0, weights, 0, 0, _reward_bytes(evaluation.rewards), _encoder_bytes(counts))
    found = memory(sizes, phases, Shares(), at_rest(recipe, counts, cached), separate=counts.cuda)
    try:
        prompts = len(prompt_rows(evaluation.prompts))
    except (OSError, PosttrainError):
        prompts = 0  # a plan may be made where the prompts are not
    times = 1 + len(recipe.stages)
    encoded = prompts * (1 if recipe.cache.prompts else times)
    work = image_work(counts, evaluation) * (prompts * evaluation.images_per_prompt * times)
    return Needs("evaluation", found, work + Work(low=counts.flops("text", size)) * encoded, Work())


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
