"""Calls a stage's hooks around its optimizer steps."""

from __future__ import annotations

from torch import Tensor

from posttrain.engine.tracker import Tracker
from posttrain.stages.account import Clock
from posttrain.stages.hooks.checkpoints import Checkpoints
from posttrain.stages.hooks.held_out import HeldOut
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.hooks.image_grids import ImageGrids
from posttrain.stages.hooks.records import Records
from posttrain.stages.hooks.smaller_micro_batch import SmallerMicroBatch
from posttrain.stages.hooks.totals import Totals
from posttrain.stages.stage_run import Training
from posttrain.support.progress import StageProgress


def hooks_of(training: Training, tracker: Tracker | None, bar: StageProgress, clock: Clock) -> list[Hook]:
    """The hooks of a stage, in the order in which they act. Add yours here.

    Totals come first, since records read them. The checkpoint comes after the held-out scores, which it
    keeps. ``tracker`` is None in all but the main process.
    """
    recipe, stage = training.run.recipe, training.run.stage
    checkpoints = Checkpoints(training)
    hooks: list[Hook] = [Totals(training.account), SmallerMicroBatch(training)]
    if stage.train.sample_every:
        hooks.append(ImageGrids(training, tracker))
    if stage.monitor is not None:
        assert recipe.evaluation is not None, "the recipe's validation requires it"
        hooks.append(HeldOut(training, stage.monitor, recipe.evaluation, tracker, checkpoints))
    return [*hooks, checkpoints, Records(training, tracker, bar, clock)]


class StageWatch:
    """The trainer's :class:`posttrain.engine.trainer.Watch`: passes each moment on to the hooks."""

    def __init__(self, training: Training, tracker: Tracker | None, bar: StageProgress) -> None:
        self.account, self.steps = training.account, training.run.stage.train.steps
        self.clock = Clock(training.account)
        self.hooks = hooks_of(training, tracker, bar, self.clock)

    def before_batch(self, step: int) -> bool:
        return self._between_batches(step, last=False)

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        for hook in self.hooks:
            hook.after_step(step, samples, metrics)

    def finish(self) -> None:
        """Let the hooks act after the last step, unless one of them ended the stage before."""
        if self.account.ended_at is None:
            self._between_batches(self.steps, last=True)

    def _between_batches(self, step: int, *, last: bool) -> bool:
        with self.clock.paused():
            goes_on = all(hook.between_batches(step, last=last) for hook in self.hooks)
        if not goes_on and self.account.ended_at is None:  # a rollback names an earlier step
            self.account.ended_at = step
        return goes_on
