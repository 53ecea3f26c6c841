"""Records the metrics of optimizer steps, and shows them on the progress bar."""

from __future__ import annotations

from torch import Tensor

from posttrain.engine.tracker import Tracker
from posttrain.errors import StepRefused
from posttrain.stages.account import Clock, forward_equivalents
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.stage_run import Training
from posttrain.support.progress import StageProgress


class Records(Hook):
    """Records the first step, the last, every ``train.log_every``-th, and every one that was refused.

    The bar moves at every step; its figures are those of the last record, since reading others would wait for
    the device.
    """

    def __init__(self, training: Training, tracker: Tracker | None, bar: StageProgress, clock: Clock) -> None:
        self.training, self.settings = training, training.run.stage.train
        self.tracker, self.bar, self.clock = tracker, bar, clock

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        if step % self.settings.log_every and step not in (1, self.settings.steps):
            self.bar.update(step)
            return
        # reading the numbers waits for the device, so it comes before the pause
        values = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
        histograms = {name: value.tolist() for name, value in metrics.items() if value.ndim == 1}
        with self.clock.paused():
            values |= self._rates()
            if self.tracker is not None:
                self.tracker.log(step, values, histograms)
            shown = {name: values.get(name) for name in ("loss", "reward", "images_per_second")}
            self.bar.update(step, **shown)

    def refused(self, step: int, error: StepRefused) -> None:
        if self.tracker is not None:
            self.tracker.log(step, {"refused_steps": 1.0})
        self.bar.update(step)

    def _rates(self) -> dict[str, float]:
        policy, strategy = self.training.policy, self.training.strategy
        return {
            "learning_rate": strategy.optimizer.param_groups[0]["lr"],
            "images_per_second": self.clock.images_per_second(),
            "forward_equivalents": forward_equivalents(policy, strategy.world),
        }
