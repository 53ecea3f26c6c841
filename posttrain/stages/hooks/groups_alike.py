"""Warns when the samples of a prompt all get the same reward, batch after batch."""

from __future__ import annotations

from torch import Tensor

from posttrain.stages.hooks.hook import Hook
from posttrain.stages.stage_run import Training

BATCHES = 5
"""A stage warns once, after so many batches in a row without a difference."""


class GroupsAlike(Hook):
    """Warns once if in :data:`BATCHES` batches in a row no group of samples had a spread of rewards."""

    def __init__(self, training: Training) -> None:
        self.run, self.in_a_row = training.run, 0

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        if "groups_without_spread" not in metrics or (step - 1) % self.run.stage.train.steps_per_batch:
            return
        alike = metrics["groups_without_spread"].item() == 1
        self.in_a_row = self.in_a_row + 1 if alike else 0
        if self.in_a_row == BATCHES:
            self.run.warn(
                f"{self.run.stage.name}, step {step}: in {BATCHES} batches no two samples of a prompt had "
                "different rewards, so there is nothing to learn from. Try prompts or a reward that tell the "
                "samples apart, a larger group_size, or more noise in the rollout"
            )
