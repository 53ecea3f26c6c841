"""Counts the FLOPs of a stage, or of an evaluation, by precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.planning.data import known
from posttrain.planning.encoders import in_cache
from posttrain.planning.phases import branches_of, calls_of, square
from posttrain.planning.rates import Kind
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


Works = Mapping[Kind, Work]
"""The work of each kind."""


def stage_work(recipe: Recipe, stage: Stage, counts: Counts) -> Works:
    """The work of a stage, image grids and held-out scores included."""
    train, calls, data = stage.train, calls_of(stage, counts), known(stage.data, counts, stage.name)
    size, samples = data.size, samples_of(stage)
    forward = _transformer(counts, size, train.precision)
    prompts = samples / stage.algorithm.samples_per_prompt
    if in_cache(recipe, stage)["prompts"] and data.prompts is not None:
        prompts = min(prompts, data.prompts)
    encoded = samples * stage.data.images_per_sample
    if in_cache(recipe, stage)["images"] and data.images is not None:
        encoded = min(encoded, data.images)
    # selective checkpointing recomputes almost nothing
    recomputed = 1 if train.gradient_checkpointing == "full" else 0
    works: dict[Kind, Work] = {
        "training": forward * ((calls.frozen + calls.training * (3 + recomputed)) * samples),
        "rollout": forward * (calls.rollout * samples),
        "text": Work(low=counts.flops("text", size) * prompts),
        "encode": Work(full=counts.flops("encode", size) * encoded if encoded else 0),
        "decode": Work(full=counts.flops("decode", size) * samples if calls.decoded else 0),
    }
    if (evaluation := recipe.evaluation) is not None:
        images = 0
        if stage.monitor is not None:
            images += (train.steps // stage.monitor.every + 1) * stage.monitor.prompts
        if train.sample_every:
            images += (train.steps // train.sample_every + 1) * SHOWN
        if images:
            settings = evaluation.model_copy(update={"precision": train.precision})
            for kind, work in image_work(counts, settings).items():
                works[kind] += work * images
    return works


def image_work(counts: Counts, sampling: Sampling) -> Works:
    """The work of sampling and decoding one image."""
    forward = _transformer(counts, square(sampling), sampling.precision)
    return {
        "rollout": forward * (branches_of(sampling, counts.model) * sampling.steps),
        "decode": Work(full=counts.flops("decode", square(sampling))),
    }


def _transformer(counts: Counts, size: Size, precision: str) -> Work:
    one = counts.flops("forward", size)
    return Work(low=one) if precision == "bf16" else Work(full=one)
