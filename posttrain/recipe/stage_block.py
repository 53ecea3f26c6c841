"""The schema of one entry of a recipe's ``stages``."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.data.settings import AnyData, PromptData
from posttrain.engine.monitor import Monitor
from posttrain.model import DtypeName
from posttrain.optim.settings import Train
from posttrain.policy.tuning import Full, Lora
from posttrain.recipe.reward_blocks import reward_blocks
from posttrain.recipe.variants import AnyAlgorithm, AnyReward, Name, check_rewards_differ
from posttrain.registry import Spec, field_error
from posttrain.support.wording import multiples_near

BASE = "base"
"""The name of the model before any stage, in ``start_from``, ``reference`` and the report."""
RESERVED_NAMES = (BASE, "data", "model")
"""Folders of a run that no stage may take as its own."""


class Stage(Spec):
    """One algorithm, run on one data set, from given weights."""

    name: Name
    """Name of the stage and of its folder in the run. Later stages refer to it."""
    start_from: str | None = None
    """Weights that training starts from: ``base``, an earlier stage's name, or a folder that a stage wrote.
    Default: the previous stage in the recipe, or ``base`` for the first."""
    algorithm: AnyAlgorithm
    """Training algorithm, chosen by its ``type``, with its hyper-parameters."""
    data: AnyData
    """Images with captions for ``sft`` and ``soar``; prompts for the online algorithms."""
    rewards: Annotated[list[AnyReward], BeforeValidator(reward_blocks)] = []
    """Rewards of an online algorithm, which maximises their weighted sum."""
    reference: str | None = None
    """Weights that the KL term of an online algorithm compares with: ``base``, an earlier stage's name, or a
    folder that a stage wrote. Default: the weights that the stage starts from."""
    monitor: Monitor | None = None
    """Held-out scores during training, with alarms. Default: none."""
    tune: Annotated[Full | Lora, Field(discriminator="type")] = Full()
    """Weights that are trained: all of the transformer's (``full``) or a low-rank adapter (``lora``)."""
    train: Train
    """Optimization: steps, batch size, learning rate, precision, checkpoints."""
    export_dtype: DtypeName = "fp32"
    """Dtype of the transformer that full fine-tuning writes to ``final/``."""

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if self.name in RESERVED_NAMES:
            raise ValueError(f"a stage cannot be called {self.name!r}: that folder of a run has another use")
        return self

    @model_validator(mode="after")
    def _data_and_rewards_suit_the_algorithm(self) -> Self:
        kind, online = self.algorithm.type, self.algorithm.needs == "rewards"
        prompts = isinstance(self.data, PromptData)
        if online and not prompts:
            raise field_error(("data",), f"{kind} makes its own images: give it 'prompts', not images")
        if not online and prompts:
            raise field_error(("data",), f"{kind} trains on given images: give it 'images', not prompts")
        if online and not self.rewards:
            raise field_error(("rewards",), f"{kind} learns from rewards, and there is none")
        if not online and self.rewards:
            raise field_error(
                ("rewards",), f"{kind} does not use rewards, so these would have no effect: remove them"
            )
        return self

    @model_validator(mode="after")
    def _reference_is_used(self) -> Self:
        if self.reference is not None and "reference" not in self.algorithm.roles:
            message = (
                f"{self.algorithm.type} with these settings has no reference, so it would have no effect: "
                "remove it"
            )
            raise field_error(("reference",), message)
        return self

    @model_validator(mode="after")
    def _monitor_suits_the_algorithm(self) -> Self:
        if self.monitor is None:
            return self
        if self.monitor.every % self.train.steps_per_batch:
            message = f"{self.monitor.every} is no multiple of steps_per_batch, {self.train.steps_per_batch}"
            raise field_error(("monitor", "every"), message)
        if self.algorithm.needs != "rewards":
            for alarm in ("reward_hacking", "spread_collapse"):
                if getattr(self.monitor, alarm) != "warn":
                    message = f"{self.algorithm.type} has no rewards, so this alarm never sounds: remove it"
                    raise field_error(("monitor", alarm), message)
        return self

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        check_rewards_differ(self.rewards)
        return self

    @model_validator(mode="after")
    def _groups_divide_the_batch(self) -> Self:
        group, batch = self.algorithm.samples_per_prompt, self.train.batch_size
        if batch % group:
            near = multiples_near(batch, group)
            message = (
                f"{batch} samples cannot be split into groups of {group}; the nearest that can are {near}"
            )
            raise field_error(("train", "batch_size"), message)
        return self
