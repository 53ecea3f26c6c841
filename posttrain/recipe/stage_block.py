"""The schema of one entry of a recipe's ``stages``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from posttrain.data.family import Data
from posttrain.engine.monitor import Monitor
from posttrain.model import DtypeName
from posttrain.optim.settings import Train
from posttrain.policy.tuning import Full, Lora
from posttrain.recipe.reward_blocks import reward_blocks
from posttrain.recipe.variants import AnyAlgorithm, AnyData, AnyReward, Name, check_rewards_differ
from posttrain.registry import FREE, Spec, field_error
from posttrain.support.wording import nearest

BASE = "base"
"""The name of the model before any stage, in ``start_from``, ``reference`` and the report."""
RESERVED_NAMES = (BASE, "data", "model")
"""Folders of a run that no stage may take as its own."""
RUN_FILES = (".json", ".jsonl", ".yaml", ".html")
"""Endings of the files that a run writes beside the folders of its stages."""


class Stage(Spec):
    """One algorithm, run on one data set, from given weights."""

    name: Name
    """Name of the stage and of its folder in the run. Later stages refer to it."""
    start_from: str | None = None
    """Weights that training starts from: ``base``, an earlier stage's name, or the folder of a stage or of a
    run, which stands for its last finished stage. Default: the previous stage in the recipe, or ``base`` for
    the first."""
    algorithm: AnyAlgorithm
    """Training algorithm, chosen by its ``type``, with its hyper-parameters."""
    data: AnyData
    """What the algorithm trains on: images with captions for ``sft``, ``soar`` and ``reflexflow``, pairs for
    ``dpo``, prompts for the online algorithms."""
    rewards: Annotated[list[AnyReward], BeforeValidator(reward_blocks)] = []
    """Rewards of an online algorithm, which maximises their weighted sum."""
    reference: str | None = None
    """Weights that the KL term of an online algorithm, or ``dpo``, compares with: ``base``, an earlier
    stage's name, or a folder as in ``start_from``. Default: the weights that the stage starts from."""
    monitor: Monitor | None = None
    """Held-out scores during training, with alarms. Default: none."""
    tune: Annotated[Full | Lora, Field(discriminator="type")] = Full()
    """Weights that are trained: all of the transformer's (``full``) or a low-rank adapter (``lora``)."""
    train: Train
    """Optimization: steps, batch size, learning rate, precision, checkpoints."""
    export_dtype: Annotated[DtypeName | Literal["auto"], FREE] = "auto"
    """Precision of all weights that full fine-tuning writes to ``final/``. ``auto``: bf16 where the base's
    transformer is in bf16, else fp32. Later stages start from the exact weights."""

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        name = self.name.lower()  # on some systems both are one file
        if name in RESERVED_NAMES:
            message = f"a stage cannot be called {self.name!r}: that folder of a run has another use"
            raise field_error(("name",), message)
        if name.endswith(RUN_FILES):
            message = f"a stage cannot be called {self.name!r}: files of a run end in {', '.join(RUN_FILES)}"
            raise field_error(("name",), message)
        return self

    @model_validator(mode="after")
    def _data_and_rewards_suit_the_algorithm(self) -> Self:
        kind = self.algorithm.type
        # a class of the user's own may have forgotten it
        needs, gives = getattr(self.algorithm, "needs", None), getattr(self.data, "gives", None)
        if needs is None:
            message = (
                f"the class of {kind!r} does not say what it needs: write needs: ClassVar = 'images' in it"
            )
            raise field_error(("algorithm",), message)
        if gives != needs:
            types = sorted(
                name for name, data in Data.variants.items() if getattr(data, "gives", "") == needs
            )
            known = f"type {' or '.join(map(repr, types))}" if types else "no installed type does"
            message = f"{kind} needs {needs}, and data of type {self.data.type!r} give {gives}: {known}"
            raise field_error(("data",), message)
        if self.algorithm.uses_rewards and not self.rewards:
            raise field_error(("rewards",), f"{kind} learns from rewards, and there is none")
        if not self.algorithm.uses_rewards and self.rewards:
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
            if self.train.keep_best is not None:
                message = "it is read by the stage's monitor, and there is none: add 'monitor: {}'"
                raise field_error(("train", "keep_best"), message)
            return self
        if self.monitor.every % self.train.steps_per_batch:
            message = f"{self.monitor.every} is no multiple of steps_per_batch, {self.train.steps_per_batch}"
            raise field_error(("monitor", "every"), message)
        if not self.algorithm.uses_rewards:
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
        if not isinstance(group, int) or group < 1:
            message = f"samples_per_prompt of {self.algorithm.type!r} is {group!r}, no whole number from 1 on"
            raise field_error(("algorithm",), message)
        if batch % group:
            message = f"{batch} samples cannot be split into groups of {group}; {nearest(batch, group)}"
            raise field_error(("train", "batch_size"), message)
        return self
