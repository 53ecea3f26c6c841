"""Calls a stage's hooks around its optimizer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from posttrain.engine.tracker import Tracker
from posttrain.errors import StepRefused
from posttrain.scoring.judge import Judge
from posttrain.stages.account import Clock
from posttrain.stages.hooks.checkpoints import Checkpoints
from posttrain.stages.hooks.groups_alike import GroupsAlike
from posttrain.stages.hooks.held_out import HeldOut
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.hooks.image_grids import ImageGrids
from posttrain.stages.hooks.records import Records
from posttrain.stages.hooks.refused_steps import RefusedSteps
from posttrain.stages.hooks.smaller_micro_batch import SmallerMicroBatch
from posttrain.stages.hooks.totals import Totals
from posttrain.stages.stage_run import Training
from posttrain.support.progress import StageProgress
from posttrain.support.stopping import Stopped


def hooks_of(
    training: Training, tracker: Tracker | None, bar: StageProgress, clock: Clock, judge: Judge
) -> list[Hook]:
    """The hooks of a stage, in the order in which they act. Add yours here.

    Totals come first, since records read them. The checkpoint comes after the held-out scores, which it
    keeps. Refused steps come last, since they may end the run. ``tracker`` is None in all but the main
    process.
    """
    recipe, stage = training.run.recipe, training.run.stage
    checkpoints = Checkpoints(training, tracker)
    hooks: list[Hook] = [Totals(training.account), SmallerMicroBatch(training)]
    if stage.train.sample_every:
        hooks.append(ImageGrids(training, tracker))
    if stage.monitor is not None:
        assert recipe.evaluation is not None, "the recipe's validation requires it"
        hooks.append(HeldOut(training, stage.monitor, recipe.evaluation, tracker, checkpoints, judge))
    hooks += [checkpoints, Records(training, tracker, bar, clock), GroupsAlike(training)]
    return [*hooks, RefusedSteps(training)]


class StageWatch:
    """The trainer's :class:`posttrain.engine.trainer.Watch`: passes each moment on to the hooks."""

    def __init__(self, training: Training, tracker: Tracker | None, bar: StageProgress, judge: Judge) -> None:
        self.training, self.account = training, training.account
        self.steps = training.run.stage.train.steps
        self.clock = Clock(training.account)
        self.hooks = hooks_of(training, tracker, bar, self.clock, judge)
        self._note(training.start)

    def before_batch(self, step: int) -> bool:
        return self._between_batches(step, last=False)

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        for hook in self.hooks:
            hook.after_step(step, samples, metrics)

    def refused(self, step: int, error: StepRefused) -> None:
        for hook in self.hooks:
            hook.refused(step, error)

    def finish(self) -> None:
        """Let the hooks act after the last step, unless one of them ended the stage before."""
        if self.account.ended_at is None:
            self._between_batches(self.steps, last=True)

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Write a checkpoint if Stopped is raised in the block: the batch, reading or image grid in hand is
        given up, since it is made again. Raises Stopped with what is kept."""
        try:
            yield
        except Stopped:
            step, self.account.next_batch, self.training.policy.forward_equivalents = self._before
            if step:
                for hook in self.hooks:
                    hook.stop(step)
            kept = f"after step {step}, whose checkpoint is written" if step else "before its first step"
            raise Stopped(f"{self.training.run.stage.name} ended {kept}") from None

    def _note(self, step: int) -> None:
        """Note the state before what may be given up."""
        self._before = step, self.account.next_batch, self.training.policy.forward_equivalents

    def _between_batches(self, step: int, *, last: bool) -> bool:
        self._note(step)
        self.training.run.world.stop_if_told()
        with self.clock.paused():
            goes_on = all(hook.between_batches(step, last=last) for hook in self.hooks)
        self._note(step)
        if not goes_on and self.account.ended_at is None:  # a rollback names an earlier step
            self.account.ended_at = step
        return goes_on
