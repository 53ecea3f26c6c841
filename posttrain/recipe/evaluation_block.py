"""The schema of a recipe's ``evaluation`` block, and of the rewards that score existing images."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.data.settings import AnyPrompts
from posttrain.flow.sampling_settings import Sampling
from posttrain.recipe.reward_blocks import reward_blocks
from posttrain.recipe.variants import AnyReward, check_rewards_differ
from posttrain.registry import FREE, Spec


class Evaluation(Sampling):
    """How the base model and every stage are compared: with the same prompts, noise and sampler."""

    prompts: AnyPrompts
    """Prompts to draw images for: a file's path, or ``{type: shapes, count: N}``."""
    rewards: Annotated[list[AnyReward], Field(min_length=1), BeforeValidator(reward_blocks)]
    """Rewards that score the images. Each is reported by itself, so none may have a weight."""
    images_per_prompt: int = Field(default=1, ge=1, le=10_000)
    """Images drawn for each prompt, each from its own noise."""
    batch_size: Annotated[int, FREE] = Field(default=16, ge=1, le=65_536)
    """Images sampled at a time on each process. It changes speed and memory, never the noise."""
    grid: Annotated[int, FREE] = Field(default=8, ge=0, le=1000)
    """Number of prompts whose images the report shows."""
    keep: Annotated[Literal["grid", "png", "jpeg"], FREE] = "grid"
    """Images to keep on disk. ``grid`` keeps those that the report shows; ``png`` and ``jpeg`` keep all, in
    that format, with prompt and scores in their metadata."""

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        _check_reported_singly(self.rewards)
        return self


class Scoring(Spec):
    """Rewards that score existing images; each is reported by itself."""

    rewards: Annotated[list[AnyReward], Field(min_length=1), BeforeValidator(reward_blocks)]
    """Rewards that score the images, each without a weight."""

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        _check_reported_singly(self.rewards)
        return self


def _check_reported_singly(rewards: list[AnyReward]) -> None:
    check_rewards_differ(rewards)
    if weighted := [reward.label for reward in rewards if reward.weight != 1]:
        raise ValueError(
            f"rewards: an evaluation reports each score by itself, so the weight of "
            f"{', '.join(weighted)} would have no effect: remove it"
        )
