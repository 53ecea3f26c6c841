"""Counts what a stage, or the evaluation, needs: memory on each device, FLOPs and disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from posttrain.cache.prompts import PROMPT_ENCODE_BATCH
from posttrain.data.prompts import prompt_rows
from posttrain.errors import PosttrainError
from posttrain.model import EncoderName, torch_dtype
from posttrain.parallel.shares import Shares
from posttrain.planning.counts import Counts
from posttrain.planning.data import known
from posttrain.planning.encoders import at_rest, in_cache, on_device, text_phase
from posttrain.planning.memory import Memory, Phase, memory
from posttrain.planning.phases import StagePlan, branches_of, calls_of, items_in_step, square
from posttrain.planning.rates import Kind
from posttrain.planning.settled import in_words, settled
from posttrain.planning.sizes import Sizes, disk_bytes, stage_sizes
from posttrain.planning.work import Work, Works, image_work, stage_work
from posttrain.policy.precision import AUTOCAST

if TYPE_CHECKING:
    from posttrain.recipe.schema import Evaluation, Recipe, Stage
    from posttrain.reward import Reward

MOST_ROWS = 64
"""The most rows in one forward of an evaluation: the default ``micro_batch`` of a Policy."""


@dataclass(frozen=True)
class Needs:
    """What a stage or the evaluation needs."""

    name: str
    memory: Memory
    works: Works
    """The work of each kind."""
    mode: Mapping[str, Any]
    """What decides how fast the transformer works, as :class:`posttrain.planning.rates.Wanted` has it."""
    evaluates: bool = False
    """Whether it is the evaluation."""
    disk: float = 0.0
    """Bytes of checkpoints and the artifact."""
    decided: str | None = None
    """What the plan decided where the recipe says ``auto``, in a line; None if it does not."""

    @property
    def training(self) -> Work:
        return self.works["training"]

    @property
    def rollout(self) -> Work:
        """Everything that trains nothing: it makes the images to learn from, to look at or to compare."""
        return sum((work for kind, work in self.works.items() if kind != "training"), Work())


def stage_needs(
    recipe: Recipe, stage: Stage, counts: Counts, devices: int = 1, limit: float = math.inf
) -> Needs:
    """What ``stage`` needs, with text encoders, autoencoder, held-out scores and image grids. Rewards'
    networks count in memory, by the size of their files, and not in FLOPs.

    What is ``auto`` is decided as :func:`posttrain.planning.settled.settled` says, for ``limit`` bytes.
    """
    sizes, shares = _sizes(recipe, stage, counts, devices), recipe.parallel.shares(devices)
    resting = at_rest(recipe, counts, in_cache(recipe, stage))

    def needed(stage: Stage, micro_batch: int) -> Memory:
        phases = dict(StagePlan(recipe, stage, counts, devices, micro_batch).phases())
        return memory(sizes, phases, shares, resting, separate=counts.cuda)

    given, stage = stage, settled(stage, counts, devices, limit, needed)
    micro_batch = int(stage.train.micro_batch)
    train, size = stage.train, known(stage.data, counts, stage.name).size
    items = min(micro_batch, items_in_step(stage, counts, devices))
    mode = {
        "algorithm": stage.algorithm.type,
        "tune": stage.tune.type,
        "compile": train.compile,
        "checkpointing": str(train.gradient_checkpointing),
        "micro_batch": items * calls_of(stage, counts).rows_with,
        "forward": counts.flops("forward", size),
    }
    return Needs(
        stage.name,
        needed(stage, micro_batch),
        stage_work(recipe, stage, counts),
        mode,
        disk=disk_bytes(stage, sizes),
        decided=in_words(given, stage),
    )


def evaluation_needs(recipe: Recipe, evaluation: Evaluation, counts: Counts) -> Needs:
    """What evaluating the base model and every stage needs."""
    cached: dict[EncoderName, bool] = {"prompts": recipe.cache.prompts}
    # an outline without a tune has no trained weights
    weights = counts.shape().transformer.frozen * torch_dtype(evaluation.precision).itemsize // 4
    sizes = Sizes(0, weights, 0, 0, _reward_bytes(evaluation.rewards), counts.encoder_bytes())
    phases = _evaluation_phases(recipe, evaluation, counts, cached)
    resting = at_rest(recipe, counts, cached)
    held = memory(sizes, phases, Shares(), resting, separate=counts.cuda)
    mode = {
        "micro_batch": min(MOST_ROWS, evaluation.batch_size),
        "forward": counts.flops("forward", square(evaluation)),
    }
    return Needs("evaluation", held, _evaluation_work(recipe, evaluation, counts), mode, evaluates=True)


def _evaluation_phases(
    recipe: Recipe, evaluation: Evaluation, counts: Counts, cached: dict[EncoderName, bool]
) -> dict[str, Phase]:
    size, images = square(evaluation), evaluation.batch_size
    forward = counts.memory("forward", size, lowered=AUTOCAST[evaluation.precision])
    rows = min(MOST_ROWS, images) * branches_of(evaluation, counts.model)
    prompts = PROMPT_ENCODE_BATCH if recipe.cache.prompts else images + 1
    return {
        "sampling": Phase(forward.peak(rows), encoders=on_device(recipe, counts, cached)),
        "decoding": Phase(
            counts.autoencoder("decode", size, images), encoders=on_device(recipe, counts, cached, "images")
        ),
        "text": text_phase(recipe, counts, {}, counts.text(prompts)),
    }


def _evaluation_work(recipe: Recipe, evaluation: Evaluation, counts: Counts) -> Works:
    try:
        prompts = len(prompt_rows(evaluation.prompts))
    except (OSError, PosttrainError):
        prompts = 0  # the prompts may be on another machine
    models = 1 + len(recipe.stages)
    encoded = prompts * (1 if recipe.cache.prompts else models)
    images = prompts * evaluation.images_per_prompt * models
    works: dict[Kind, Work] = {k: work * images for k, work in image_work(counts, evaluation).items()}
    text = Work(low=counts.flops("text", square(evaluation))) * encoded
    return {"training": Work(), "encode": Work(), "text": text, **works}


def _sizes(recipe: Recipe, stage: Stage, counts: Counts, devices: int) -> Sizes:
    shape = counts.shape(stage.tune)
    rewards = list(stage.rewards)
    if stage.monitor is not None and recipe.evaluation is not None:
        rewards += recipe.evaluation.rewards
    sizes = stage_sizes(recipe, stage, shape.transformer)
    encoders = counts.encoder_bytes()
    # sharded weights are lowered as they are gathered
    lowers = AUTOCAST[stage.train.precision] is not None and recipe.parallel.lowers
    gathers = recipe.parallel.shares(devices).gathers
    return replace(
        sizes,
        lowered=2 * sizes.trained if lowers and not gathers else 0,
        rewards=_reward_bytes(rewards),
        encoders=encoders,
        companions=sum(encoders.values()) if sizes.companions is None else sizes.companions,
        gathered=shape.gathered,
        gathered_gradients=shape.gathered_gradients,
    )


def _reward_bytes(rewards: Iterable[Reward]) -> int:
    files = {getattr(r, name): weights.size for r in rewards for name, weights in r.weights.items()}
    return sum(files.values())
