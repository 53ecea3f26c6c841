"""Writes checkpoints, and rolls a stage back to one."""

from __future__ import annotations

import time
from dataclasses import asdict

from torch import Tensor

from posttrain.engine.checkpoint_folder import Retention
from posttrain.engine.tracker import Tracker
from posttrain.errors import PosttrainError
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.stage_run import Training


class Checkpoints(Hook):
    """Writes a checkpoint every ``train.checkpoint_every`` steps, after the last, and
    ``train.checkpoint_minutes`` after the one before."""

    def __init__(self, training: Training, tracker: Tracker | None) -> None:
        self.training, self.account, self.tracker = training, training.account, tracker
        self.settings, self.world = training.run.stage.train, training.run.world
        self._saved_at = time.monotonic()

    def between_batches(self, step: int, *, last: bool) -> bool:
        if last or (step and (step % self.settings.checkpoint_every == 0 or self._is_time())):
            self.save(step)
        return True

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        self.training.checkpoints.check()

    def stop(self, step: int) -> None:
        self.save(step)
        self.training.checkpoints.wait()

    def _is_time(self) -> bool:
        """Whether the last checkpoint is too old, by the clock of the main process."""
        if not (minutes := self.settings.checkpoint_minutes):
            return False
        return self.world.any(self.world.is_main and time.monotonic() - self._saved_at >= minutes * 60)

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps, unless there is a checkpoint of that step."""
        account, settings = self.account, self.settings
        self._saved_at = time.monotonic()
        account.skipped = self.training.skipped()
        if self.tracker is not None:
            account.rows = self.tracker.metrics.on_disk()
        protected = frozenset((account.good, account.best))
        retention = Retention(settings.keep_checkpoints, settings.keep_every, protected)
        self.training.checkpoints.save(step, asdict(account), retention)

    def roll_back(self, step: int) -> None:
        """Restore weights, optimizer and account of ``step``, and remove all later checkpoints.

        If the checkpoint of ``step`` is damaged, it is the newest whole one before. The account keeps its
        alarms and the images that were left out, and says at which step the stage ended. Raises
        PosttrainError if there is no whole one.
        """
        kept = {"alarms": self.account.alarms, "skipped": self.account.skipped}
        checkpoints = self.training.checkpoints
        if (restored := checkpoints.restore(until=step)) is None:
            raise PosttrainError(f"no checkpoint of step {step} or before in {str(checkpoints.folder)!r}")
        checkpoints.drop_after(restored.step)
        self.account.replace_by({**restored.extra, **kept, "ended_at": restored.step})
