"""Counts steps that were refused, and stops the run after several in a row."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor

from posttrain.engine.tracker import json_line
from posttrain.errors import StepRefused, TrainingError
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.stage_run import Training
from posttrain.support.files import write

FILE = "refused_steps.jsonl"


class RefusedSteps(Hook):
    """Warns of every refused step, and after ``train.stop_after_refused`` in a row raises TrainingError.

    The error names the file with the samples of these steps: step, id, prompt, loss, and sigma or reason.
    """

    def __init__(self, training: Training) -> None:
        self.run, self.account = training.run, training.account
        self.samples: list[dict[str, Any]] = []
        """Of the refused steps in a row that this process has seen."""

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        self.account.refused_in_a_row = 0
        self.samples.clear()

    def refused(self, step: int, error: StepRefused) -> None:
        run, account, limit = self.run, self.account, self.run.stage.train.stop_after_refused
        account.refused += 1
        account.refused_in_a_row += 1
        of_all = chain.from_iterable(run.world.gather_objects(list(error.samples)))
        self.samples += [{"step": step, **sample} for sample in of_all]
        name = run.stage.name
        if account.refused_in_a_row < limit:
            run.warn(f"{name}, step {step}: {error} ({account.refused_in_a_row} in a row of {limit})")
            return
        if run.world.is_main:
            write(run.folder / FILE, "".join(json_line(sample) for sample in self.samples))
        raise TrainingError(
            f"{name}, step {step}: {error}, as were {limit} in a row (train.stop_after_refused). Their "
            f"samples are in {str(run.folder / FILE)!r}. Try a lower learning_rate, a warm-up, or precision "
            "fp32, or repair the samples or the reward"
        )
