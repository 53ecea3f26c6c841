"""How many FLOPs does a stage, or an evaluation, take, and in which precision?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.planning.data import known
from posttrain.planning.phases import branches_of, calls_of, in_cache, square
from posttrain.stages.hooks.image_grids import SHOWN

if TYPE_CHECKING:
    from posttrain.flow.sampling_settings import Sampling
    from posttrain.planning.counts import Counts, Size
    from posttrain.recipe.schema import Recipe, Stage


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


def stage_work(recipe: Recipe, stage: Stage, counts: Counts) -> tuple[Work, Work]:
    """Of forwards that train nothing, and of training."""
    train, calls, data = stage.train, calls_of(stage, counts), known(stage.data, counts, stage.name)
    size, samples = data.size, train.steps * train.batch_size / train.steps_per_batch
    forward = _transformer(counts, size, train.precision)
    prompts = samples / stage.algorithm.samples_per_prompt
    if in_cache(recipe, stage)["prompts"] and data.prompts is not None:
        prompts = min(prompts, data.prompts)
    encoded = samples
    if in_cache(recipe, stage)["images"] and data.images is not None:
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
        each = image_work(counts, evaluation.model_copy(update={"precision": train.precision}))
        if stage.monitor is not None:
            made += each * ((train.steps // stage.monitor.every + 1) * stage.monitor.prompts)
        if train.sample_every:
            made += each * ((train.steps // train.sample_every + 1) * SHOWN)
    return made, trained


def image_work(counts: Counts, sampling: Sampling) -> Work:
    """Of one image."""
    forward = _transformer(counts, square(sampling), sampling.precision)
    decoded = Work(full=counts.flops("decode", square(sampling)))
    return forward * (branches_of(sampling) * sampling.steps) + decoded


def _transformer(counts: Counts, size: Size, precision: str) -> Work:
    one = counts.flops("forward", size)
    return Work(low=one) if precision == "bf16" else Work(full=one)
