"""Remembers a micro-batch that was halved for lack of memory."""

from __future__ import annotations

from torch import Tensor

from posttrain.stages.hooks.hook import Hook
from posttrain.stages.micro_batch import remember
from posttrain.stages.stage_run import Training


class SmallerMicroBatch(Hook):
    """Writes the new micro-batch to the stage's folder, so that a resumed run begins with it."""

    def __init__(self, training: Training) -> None:
        self.run, self.policy = training.run, training.policy
        self.remembered = training.policy.micro_batch

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        if self.policy.micro_batch < self.remembered:
            self.remembered = self.policy.micro_batch
            remember(self.run.recipe, self.run.folder, self.run.world.size, self.remembered)
