"""Writes checkpoints, and rolls a stage back to one."""

from __future__ import annotations

import shutil
from dataclasses import asdict

from posttrain.engine import checkpoint
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.stage_run import Training


class Checkpoints(Hook):
    """Writes a checkpoint every ``train.checkpoint_every`` steps and after the last."""

    def __init__(self, training: Training) -> None:
        self.training, self.account = training, training.account
        self.settings, self.world = training.run.stage.train, training.run.world
        self.folder = training.run.folder / "checkpoints"

    def between_batches(self, step: int, *, last: bool) -> bool:
        if last or (step and step % self.settings.checkpoint_every == 0):
            self.save(step)
        return True

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps, unless there is a checkpoint of that step."""
        exists = any(path.name == f"step-{step:08d}" for path in checkpoint.saved(self.folder))
        if self.world.broadcast(exists):
            return
        policy, strategy, keep = self.training.policy, self.training.strategy, self.settings.keep_checkpoints
        extra = asdict(self.account)
        checkpoint.save(self.folder, step, policy, strategy, extra, keep, self.account.good)

    def roll_back(self, step: int) -> None:
        """Restore weights, optimizer and account of ``step``, and remove all later checkpoints.

        The account keeps its alarms, and says that the stage ended at ``step``.
        """
        alarms = self.account.alarms
        with self.world.main_first():
            for path in checkpoint.saved(self.folder):
                if int(path.name.removeprefix("step-")) > step:
                    shutil.rmtree(path)
        latest = checkpoint.saved(self.folder)[-1]
        _, kept = checkpoint.restore(latest, self.training.policy, self.training.strategy)
        self.account.replace_by({**kept, "alarms": alarms, "ended_at": step})
