"""Counts the FLOPs of a stage, or of an evaluation, by precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.planning.data import known
from posttrain.planning.phases import branches_of, calls_of, in_cache, square
from posttrain.planning.sizes import samples_of
from posttrain.stages.hooks.image_grids import SHOWN

if TYPE_CHECKING:
    from posttrain.flow.sampling_settings import Sampling
    from posttrain.planning.counts import Counts, Size
    from posttrain.recipe.schema import Recipe, Stage


@dataclass(frozen=True)
class Work:
    """FLOPs by precision."""

    low: float = 0.0
    """FLOPs in bf16."""
    full: float = 0.0
    """FLOPs in float32, or in TF32 if the recipe allows it."""

    def __add__(self, other: Work) -> Work:
        return Work(self.low + other.low, self.full + other.full)

    def __mul__(self, times: float) -> Work:
        return Work(self.low * times, self.full * times)


def stage_work(recipe: Recipe, stage: Stage, counts: Counts) -> tuple[Work, Work]:
    """The work of forwards that train nothing (rollouts, encoding, image grids), and the work of training."""
    train, calls, data = stage.train, calls_of(stage, counts), known(stage.data, counts, stage.name)
    size, samples = data.size, samples_of(stage)
    forward = _transformer(counts, size, train.precision)
    prompts = samples / stage.algorithm.samples_per_prompt
    if in_cache(recipe, stage)["prompts"] and data.prompts is not None:
        prompts = min(prompts, data.prompts)
    encoded = samples
    if in_cache(recipe, stage)["images"] and data.images is not None:
        encoded = min(samples, data.images)
    rollout = forward * (calls.rollout * samples) + Work(low=counts.flops("text", size) * prompts)
    if calls.decoded:
        rollout += Work(full=counts.flops("decode", size) * samples)
    else:
        rollout += Work(full=counts.flops("encode", size) * encoded)
    # selective checkpointing recomputes almost nothing
    recomputed = 1 if train.gradient_checkpointing == "full" else 0
    training = forward * ((calls.frozen + calls.training * (3 + recomputed)) * samples)
    if (evaluation := recipe.evaluation) is not None:
        each = image_work(counts, evaluation.model_copy(update={"precision": train.precision}))
        if stage.monitor is not None:
            rollout += each * ((train.steps // stage.monitor.every + 1) * stage.monitor.prompts)
        if train.sample_every:
            rollout += each * ((train.steps // train.sample_every + 1) * SHOWN)
    return rollout, training


def image_work(counts: Counts, sampling: Sampling) -> Work:
    """The work of sampling and decoding one image."""
    forward = _transformer(counts, square(sampling), sampling.precision)
    decoded = Work(full=counts.flops("decode", square(sampling)))
    return forward * (branches_of(sampling) * sampling.steps) + decoded


def _transformer(counts: Counts, size: Size, precision: str) -> Work:
    one = counts.flops("forward", size)
    return Work(low=one) if precision == "bf16" else Work(full=one)
