"""Scores held-out prompts while a stage trains, and acts on alarms."""

from __future__ import annotations

import functools
import math
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from posttrain.cache.keys import digest
from posttrain.data.prompts import prompt_rows
from posttrain.engine.monitor import Action, Monitor, collapsed, hacking
from posttrain.engine.tracker import Tracker
from posttrain.engine.trainer import EMA
from posttrain.errors import TrainingError
from posttrain.sampling.sampler import FlowSampler
from posttrain.scoring.batches import draw_and_score, samples_of
from posttrain.stages.hooks.checkpoints import Checkpoints
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.stage_run import Training

if TYPE_CHECKING:
    from posttrain.recipe.schema import Evaluation
    from posttrain.reward import Scorer
    from posttrain.scoring.judge import Judge


class HeldOut(Hook):
    """Reads held-out scores every ``monitor.every`` steps and after the last.

    A reading scores the first ``monitor.prompts`` prompts of the evaluation, with the weights that would be
    exported. Raises TrainingError for an alarm whose action is ``stop``.
    """

    def __init__(
        self,
        training: Training,
        monitor: Monitor,
        evaluation: Evaluation,
        tracker: Tracker | None,
        checkpoints: Checkpoints,
        judge: Judge,
    ) -> None:
        self.run, self.policy, self.account = training.run, training.policy, training.account
        self.monitor, self.evaluation = monitor, evaluation
        self.tracker, self.checkpoints, self.judge = tracker, checkpoints, judge
        # read once: a file that is edited while the stage trains must not change what is compared
        self.rows = prompt_rows(evaluation.prompts, evaluation.rewards)[: monitor.prompts]
        evaluated = {"prompts": monitor.prompts, "evaluation": evaluation.deciding()}
        self._forget_other_readings({**evaluated, "rows": digest(self.rows)})

    def _forget_other_readings(self, now: dict[str, Any]) -> None:
        """Leave out of the account what was read with other prompts or settings than ``now``."""
        account = self.account
        # an earlier version did not keep the rows
        if account.readings and {**now, **(account.read_with or {})} != now:
            account.readings, account.rewards, account.read_at = [], [], None
            account.best, account.best_score = None, None
            reason = "the evaluation, its prompts or monitor.prompts changed"
            self.run.note(f"{self.run.stage.name}: held-out scores begin anew: {reason}")
        account.read_with = now
        name = self.run.stage.train.keep_best
        if name != account.best_by:
            account.best, account.best_score, account.best_by = None, None, name

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        first_of_batch = (step - 1) % self.run.stage.train.steps_per_batch == 0
        if "reward" in metrics and first_of_batch:
            self.account.pending.append(metrics["reward"].item())
            self.account.spreads.append(metrics["reward_group_std"].item())

    def between_batches(self, step: int, *, last: bool) -> bool:
        if (last or step % self.monitor.every == 0) and self.account.read_at != step:
            self._read(step)
            self._act(step)
        return self.account.ended_at is None

    def _read(self, step: int) -> None:
        """Take the scores into the account, with the mean training reward since the last reading."""
        records, rewards = self._scored(), self.evaluation.rewards
        scores = {r.label: [record["scores"][r.label] for record in records] for r in rewards}
        self._record(step, {f"heldout/{name}": sum(values) / len(values) for name, values in scores.items()})
        account = self.account
        account.readings.append(
            {r.label: [v if r.higher_is_better else -v for v in scores[r.label]] for r in rewards}
        )
        account.rewards.append(sum(account.pending) / len(account.pending) if account.pending else -math.inf)
        account.pending, account.read_at = [], step

    def _scored(self) -> list[dict]:
        """The records of all held-out samples; each process draws and scores a share of them."""
        evaluation, world = self.evaluation, self.run.world
        samples = samples_of(self.rows, 1)
        share = -(-len(samples) // world.size)
        # under sharding every process must make as many forwards, so the last ones repeat samples
        own_samples = (samples * world.size)[world.rank * share :][:share]
        with self.policy.using(EMA if EMA in self.policy.roles else None):
            batches = draw_and_score(FlowSampler(self.policy), evaluation, own_samples, self._scorers)
            own_records: list[dict] = []
            for records, _ in batches:
                own_records += records
                self.run.world.stop_if_told()  # a resumed stage takes the whole reading again
        return list(chain.from_iterable(world.gather_objects(own_records)))[: len(samples)]

    @functools.cached_property
    def _scorers(self) -> dict[str, Scorer]:
        return self.judge.scorers_of(self.evaluation.rewards)

    def _act(self, step: int) -> None:
        """Raise the alarms of this reading, or protect its checkpoint where a rollback may need it."""
        monitor, account = self.monitor, self.account
        reasons: dict[str, str | None] = {
            "reward_hacking": hacking(account.rewards, account.readings, monitor.window),
            "spread_collapse": collapsed(account.spreads, monitor.spread_fraction),
        }
        actions: dict[str, Action] = {kind: getattr(monitor, kind) for kind in reasons}
        for kind, reason in reasons.items():
            if reason is not None and account.ended_at is None:
                self._alarm(step, kind, actions[kind], reason)
        if is_good := "rollback" in actions.values() and not any(reasons.values()):
            account.good = step
        is_best = account.ended_at is None and self._is_best(step)
        if is_good or is_best:
            self.checkpoints.save(step)  # once, since it keeps the account

    def _is_best(self, step: int) -> bool:
        """Whether this reading is the best so far by ``train.keep_best``; the account then says so."""
        account, name = self.account, self.run.stage.train.keep_best
        if name is None or not step:
            return False
        values = account.readings[-1][name]
        score = sum(values) / len(values)
        if is_best := math.isfinite(score) and (account.best_score is None or score > account.best_score):
            account.best, account.best_score = step, score
        return is_best

    def _alarm(self, step: int, kind: str, action: Action, reason: str) -> None:
        text = f"{self.run.stage.name}, step {step}: {kind}: {reason}"
        self._record(step, {f"alarm/{kind}": 1.0})
        if action == "stop":
            raise TrainingError(f"{text} (monitor.{kind}: stop)")
        self.account.alarms.append(text)
        self.run.warn(text)
        if action == "rollback" and (good := self.account.good) is not None:
            self.checkpoints.roll_back(good)
            ended_at = self.account.ended_at
            self.run.warn(f"{self.run.stage.name}: rolled back to step {ended_at}, where it ends")

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(step, metrics)
