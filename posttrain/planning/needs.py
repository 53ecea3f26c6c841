"""What does a stage, or the evaluation, need: memory on each device, and how many FLOPs?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.data.prompts import prompt_rows
from posttrain.data.spec import Images, PromptData
from posttrain.errors import PosttrainError
from posttrain.plan import disk_bytes
from posttrain.planning.counts import Counts
from posttrain.planning.memory import Memory, Phase, Sizes, StrategyName, memory
from posttrain.planning.rehearsal import rehearse
from posttrain.stage import AUTOCAST
from posttrain.trainer import REFERENCE
from posttrain.watch import SHOWN

if TYPE_CHECKING:
    from posttrain.recipe import Evaluation, Recipe, Sampling, Stage
    from posttrain.reward import Reward

SHAPES_SIDE = 64
CHUNK = 64
"""Most rows in one forward of an evaluation, the default of :class:`posttrain.policy.Policy`."""


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

    @property
    def work(self) -> Work:
        return self.rollout + self.training


@dataclass(frozen=True)
class Spread:
    """Over how many devices, and how."""

    devices: int = 1
    strategy: StrategyName = "single"
    zero_stage: int = 2


def stage_needs(recipe: Recipe, stage: Stage, counts: Counts, spread: Spread) -> Needs:
    """What ``stage`` needs, text encoders, autoencoder, held-out scores and image grids included. Rewards'
    networks are counted in memory, by the size of their files, and not in FLOPs."""
    train, calls, side = stage.train, rehearse(stage.algorithm), side_of(stage)
    dtype = AUTOCAST[train.precision]
    batch = -(-train.batch_size // spread.devices)
    chunk = min(train.micro_batch, batch)
    in_step = max(int(batch * calls.items) // train.steps_per_batch, 1)
    rows = min(train.micro_batch, in_step) * calls.rows_with
    prompts = batch // stage.algorithm.samples_per_prompt + 1
    conditions = sum(t.nbytes for t in counts.condition(1).values()) * prompts
    latent = _product(counts.outline().latent_shape(side, side))
    items = batch * (calls.item_bytes[0] + calls.item_bytes[1] * latent)
    forward = counts.memory("forward", side, stage.tune, dtype)
    training = counts.memory("training", side, stage.tune, dtype, train.gradient_checkpointing)
    batch_bytes = conditions + items
    phases = {
        "training": Phase(training.at(rows), batch_bytes, gradients=in_step > train.micro_batch),
        "optimizer": Phase(0.0, batch_bytes),
        "text": Phase(counts.memory("text", side).at(prompts)),
    }
    if calls.rollout:
        phases["rollout"] = Phase(forward.at(chunk * calls.rows_without), batch_bytes)
    if calls.decoded:
        phases["decoding"] = Phase(counts.autoencoder("decode", side, chunk), batch_bytes)
    else:
        phases["encoding"] = Phase(counts.autoencoder("encode", side, batch), 4.0 * batch * latent)
    shown = recipe.evaluation.resolution if recipe.evaluation is not None else side
    looked = [SHOWN] if train.sample_every else []
    if stage.monitor is not None and recipe.evaluation is not None:
        looked.append(min(recipe.evaluation.batch_size, stage.monitor.prompts))
    if looked:
        phases["image grids"] = Phase(counts.autoencoder("decode", shown, max(looked)))
    found = memory(
        _sizes(recipe, stage, counts),
        phases,
        strategy=spread.strategy,
        zero_stage=spread.zero_stage,
        world_size=spread.devices,
    )
    rollout, trained = _work(recipe, stage, counts, side)
    return Needs(
        stage.name, found, rollout, trained, disk_bytes(stage, _sizes(recipe, stage, counts).trained)
    )


def evaluation_needs(recipe: Recipe, evaluation: Evaluation, counts: Counts) -> Needs:
    """What evaluating the base model and every stage needs."""
    side, rows = evaluation.resolution, min(CHUNK, evaluation.batch_size)
    branches = 1 if evaluation.guidance == 1 else 2
    forward = counts.memory("forward", side, None, AUTOCAST[evaluation.precision])
    phases = {
        "sampling": Phase(forward.at(rows * branches)),
        "decoding": Phase(counts.autoencoder("decode", side, evaluation.batch_size)),
    }
    outline = counts.outline()
    weights = _nbytes(outline.transformer) + _others(counts, evaluation.rewards)
    found = memory(Sizes(0, weights, 0, 0, 0), phases)
    try:
        images = len(prompt_rows(evaluation.prompts)) * evaluation.images_per_prompt
    except (OSError, PosttrainError):
        images = 0  # a plan may be made where the prompts are not
    work = _images(counts, evaluation) * (images * (1 + len(recipe.stages)))
    return Needs("evaluation", found, work, Work())


def side_of(stage: Stage) -> int:
    """The side in pixels of a square of the stage's images, of the largest where they differ."""
    data = stage.data
    if isinstance(data, PromptData):
        return data.resolution
    if isinstance(data, Images):
        if data.resolution is None:
            raise PosttrainError(f"{stage.name}: data.resolution: say it, for a plan of images of many sizes")
        return data.resolution
    return SHAPES_SIDE


def _work(recipe: Recipe, stage: Stage, counts: Counts, side: int) -> tuple[Work, Work]:
    train, calls = stage.train, rehearse(stage.algorithm)
    samples = train.steps * train.batch_size / train.steps_per_batch
    forward = _transformer(counts, side, train.precision)
    made = forward * calls.rollout + Work(low=counts.flops("text", side) / stage.algorithm.samples_per_prompt)
    made += Work(full=counts.flops("decode" if calls.decoded else "encode", side))
    trained = forward * (calls.frozen + calls.training * (4 if train.gradient_checkpointing else 3))
    extra = Work()
    if (evaluation := recipe.evaluation) is not None and stage.monitor is not None:
        read = (train.steps // stage.monitor.every + 1) * stage.monitor.prompts
        extra += _images(counts, evaluation.model_copy(update={"precision": train.precision})) * read
    if evaluation is not None and train.sample_every:
        grids = (train.steps // train.sample_every + 1) * SHOWN
        extra += _images(counts, evaluation.model_copy(update={"precision": train.precision})) * grids
    return made * samples + extra, trained * samples


def _images(counts: Counts, sampling: Sampling) -> Work:
    """Of one image."""
    branches = 1 if sampling.guidance == 1 else 2
    forward = _transformer(counts, sampling.resolution, sampling.precision)
    return forward * (branches * sampling.steps) + Work(full=counts.flops("decode", sampling.resolution))


def _transformer(counts: Counts, side: int, precision: str) -> Work:
    one = counts.flops("forward", side)
    return Work(low=one) if precision == "bf16" else Work(full=one)


def _sizes(recipe: Recipe, stage: Stage, counts: Counts) -> Sizes:
    outline = counts.outline(stage.tune)
    parameters = list(outline.transformer.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.nbytes for p in parameters if not p.requires_grad)
    roles = 4 * trained * (len(stage.algorithm.roles) + (stage.train.ema is not None))
    if REFERENCE in stage.algorithm.roles and stage.reference not in (None, recipe.parent(stage)):
        roles += frozen if stage.tune.type == "lora" else 0
    rewards = list(stage.rewards)
    if stage.monitor is not None and recipe.evaluation is not None:
        rewards += recipe.evaluation.rewards
    blocks = [m for name, m in outline.transformer.named_modules() if name.count(".") == 1]
    block = max((sum(4 * p.numel() for p in m.parameters()) for m in blocks), default=0)
    return Sizes(trained, frozen, _others(counts, rewards, stage), roles, block)


def _others(counts: Counts, rewards: Iterable[Reward], stage: Stage | None = None) -> int:
    outline = counts.outline(stage and stage.tune)
    own = {id(p) for p in outline.transformer.parameters()}
    parts = [m for m in vars(outline.pipeline).values() if hasattr(m, "parameters")]  # type: ignore[attr-defined]
    mine = sum(p.nbytes for m in parts for p in m.parameters() if id(p) not in own)
    files = {getattr(r, name): weights.size for r in rewards for name, weights in r.weights.items()}
    return mine + sum(files.values())


def _nbytes(module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _product(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
