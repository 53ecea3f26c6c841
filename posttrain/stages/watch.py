"""What happens around the steps of a stage: samples, held-out scores, checkpoints, records, and the bill."""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from posttrain.algorithm import Batch, Tools
from posttrain.data.batches import Feed
from posttrain.data.prompts import prompt_rows
from posttrain.engine import checkpoint
from posttrain.engine.monitor import Action, collapsed, hacking
from posttrain.engine.tracker import Tracker
from posttrain.engine.trainer import EMA
from posttrain.errors import TrainingError
from posttrain.parallel.strategy import Strategy
from posttrain.policy.policy import Policy
from posttrain.sampling.sampler import FlowSampler, sample_images
from posttrain.scoring.batches import draw_and_score, load_scorers, samples_of
from posttrain.scoring.judge import Judge
from posttrain.stages.micro_batch import remember
from posttrain.support.device import peak_memory
from posttrain.support.files import write
from posttrain.support.images import grid, png
from posttrain.support.progress import StageProgress

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.recipe.schema import Recipe, Stage

SHOWN = 8
"""Prompts in a stage's image grids."""


@dataclass
class Account:
    """What a stage did so far: the part of a checkpoint that is neither weights nor optimizer."""

    samples: int = 0
    seconds: float = 0.0
    next_batch: int = 0
    updates: int = 0
    """Optimizer steps that were taken, those without an item to train on not counted."""
    rewards: list[float] = field(default_factory=list)
    """The training reward's mean between readings."""
    spreads: list[float] = field(default_factory=list)
    """The reward's spread within groups, of each batch."""
    pending: list[float] = field(default_factory=list)
    """The training reward of each batch since the last reading."""
    read_at: int | None = None
    """Step of the last reading."""
    readings: list[dict[str, list[float]]] = field(default_factory=list)
    """The held-out scores of each reading."""
    good: int | None = None
    """Step of the last reading without an alarm."""
    alarms: list[str] = field(default_factory=list)


def samples_shown(recipe: Recipe, feed: Feed) -> tuple[list[str], dict[str, Any]]:
    """The prompts of a stage's image grids, and the settings of their sampling."""
    if (evaluation := recipe.evaluation) is not None:
        prompts = [row["prompt"] for row in prompt_rows(evaluation.prompts)]
        settings = evaluation.model_dump(include={"resolution", "steps", "guidance", "solver", "seed"})
    else:
        prompts = feed.prompts
        settings = {"resolution": feed.size[0], "steps": 40, "guidance": 4.5}
    return list(dict.fromkeys(prompts))[:SHOWN], settings


class StageWatch:
    """The loop's :class:`posttrain.engine.trainer.Watch`."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        policy: Policy,
        strategy: Strategy,
        folder: Path,
        tracker: Tracker | None,
        bar: StageProgress,
        account: Account,
        feed: Feed,
        judge: Judge,
        console: Console,
    ) -> None:
        self.recipe, self.stage, self.policy, self.strategy = recipe, stage, policy, strategy
        self.world = strategy.world
        self.folder, self.tracker, self.bar, self.console = folder, tracker, bar, console
        self.feed, self.judge, self.account = feed, judge, account
        self.micro_batch = policy.micro_batch
        self.since = time.monotonic()
        self.before, self.here = account.samples, 0.0
        self.shown, self.sampler = samples_shown(recipe, feed)
        self.ended_at: int | None = None

    def batches(self) -> Iterator[tuple[Batch, Tools]]:
        """The batches that are still to come, each with the tools to collect it."""
        recipe, model = self.recipe, self.policy.model
        key = (recipe.seed, recipe.depth(self.stage))
        for number, batch, draws in self.feed.batches(key, self.account.next_batch):
            # a batch that cannot be used is passed over, so this is not the optimizer's step
            self.account.next_batch = number + 1
            sigmas = functools.partial(model.sigmas, height=self.feed.size[0], width=self.feed.size[1])
            yield batch, Tools(self.policy, draws, sigmas, self.judge, self.world)

    def before_batch(self, step: int) -> bool:
        settings = self.stage.train
        self._pause()
        if settings.sample_every and step % settings.sample_every == 0:
            self._sample(step)
        monitor = self.stage.monitor
        if monitor is not None and step % monitor.every == 0 and self.account.read_at != step:
            self._read(step)
        if step and step % settings.checkpoint_every == 0 and self.ended_at is None:
            self.save(step)
        self._go_on()
        return self.ended_at is None

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        self.account.samples += samples
        self.account.updates += "skipped_steps" not in metrics
        first = (step - 1) % self.stage.train.steps_per_batch == 0
        if self.stage.monitor is not None and "reward" in metrics and first:
            self.account.pending.append(metrics["reward"].item())
            self.account.spreads.append(metrics["reward_group_std"].item())
        if self.policy.micro_batch < self.micro_batch:
            self.micro_batch = self.policy.micro_batch
            remember(self.recipe, self.folder, self.world.size, self.micro_batch)
        if step % self.stage.train.log_every and step not in (1, self.stage.train.steps):
            return
        values = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
        histograms = {name: value.tolist() for name, value in metrics.items() if value.ndim == 1}
        self._pause()
        rate = (self.account.samples - self.before) / max(self.here, 1e-9)
        learning_rate = self.strategy.optimizer.param_groups[0]["lr"]
        values |= {"learning_rate": learning_rate, "images_per_second": rate}
        values["forward_equivalents"] = self._spent()
        self._record(step, values, histograms)
        self.bar.update(step, loss=values.get("loss"), reward=values.get("reward"), images_per_second=rate)
        self._go_on()

    def finish(self) -> None:
        """Show, read and save the trained weights: the last step always is."""
        if self.ended_at is not None:
            return
        self._pause()
        last = self.stage.train.steps
        if self.stage.train.sample_every:
            self._sample(last)
        if self.stage.monitor is not None and self.account.read_at != last:
            self._read(last)
        if self.ended_at is None:
            self.save(last)

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after ``step`` steps, unless there is one."""
        folder, keep = self.folder / "checkpoints", self.stage.train.keep_checkpoints
        there = any(p.name == f"step-{step:08d}" for p in checkpoint.saved(folder))
        if not self.world.broadcast(there):
            extra = asdict(self.account)
            checkpoint.save(folder, step, self.policy, self.strategy, extra, keep, self.account.good)

    def summary(self) -> dict:
        """What the stage cost and did, for ``stage.json``. Raises TrainingError where nothing was trained."""
        if not self.account.updates or not self.policy.trained:
            why = ": no group of samples had a spread of rewards" if self.account.samples else ""
            why = ": it was rolled back to its start" if self.ended_at == 0 else why
            raise TrainingError(f"stage {self.stage.name!r} trained nothing{why}")
        return {
            "steps": self.stage.train.steps if self.ended_at is None else self.ended_at,
            "updates": self.account.updates,
            "samples": self.account.samples,
            "seconds": self.account.seconds,
            "forward_equivalents": self._spent(),
            "images_per_second": self.account.samples / self.account.seconds,
            "peak_memory_bytes": self.world.max(peak_memory(self.policy.model.device)),
            "trainable_parameters": sum(
                self.strategy.layout.shape(p).numel() for p in self.policy.trained.values()
            ),
            "parallel": {**self.recipe.parallel.model_dump(mode="json"), "processes": self.world.size},
            "skipped": list(
                dict.fromkeys(chain.from_iterable(self.world.gather_objects(self.feed.skipped())))
            ),
            "alarms": self.account.alarms,
        }

    def _sample(self, step: int) -> None:
        """Draw the same prompts from the same noise, with the weights that would be exported."""
        spent = self.policy.forward_equivalents
        with self.policy.using(EMA if EMA in self.policy.roles else None):
            images = sample_images(self.policy, self.shown, [0] * len(self.shown), **self.sampler)
        self.policy.forward_equivalents = spent
        if self.tracker is None:
            return
        picture = grid(images.cpu(), 4, captions=self.shown)
        write(self.folder / "samples" / f"step-{step:08d}.png", png(picture))
        self.tracker.image("samples", step, picture)

    @functools.cached_property
    def _scorers(self) -> dict:
        assert self.recipe.evaluation is not None, "the recipe's validation requires it"
        return load_scorers(self.recipe.evaluation.rewards, self.policy.model.device)

    def _read(self, step: int) -> None:
        """Score held-out prompts, and act on an alarm."""
        evaluation, monitor, account = self.recipe.evaluation, self.stage.monitor, self.account
        assert evaluation is not None, "the recipe's validation requires it"
        assert monitor is not None, "called where there is one"
        samples = samples_of(prompt_rows(evaluation.prompts, evaluation.rewards)[: monitor.prompts], 1)
        each = -(-len(samples) // self.world.size)
        # where weights are in parts every process must make as many forwards: the last ones repeat
        mine = (samples * self.world.size)[self.world.rank * each :][:each]
        with self.policy.using(EMA if EMA in self.policy.roles else None):
            batches = draw_and_score(FlowSampler(self.policy), evaluation, mine, self._scorers)
            records = [record for found, _ in batches for record in found]
        records = list(chain.from_iterable(self.world.gather_objects(records)))[: len(samples)]
        reading = {
            r.label: [record["scores"][r.label] * (1 if r.higher_is_better else -1) for record in records]
            for r in evaluation.rewards
        }
        means = {f"heldout/{name}": sum(values) / len(values) for name, values in reading.items()}
        self._record(step, means)
        account.readings.append(reading)
        account.rewards.append(sum(account.pending) / len(account.pending) if account.pending else -math.inf)
        account.pending, account.read_at = [], step
        alarms: list[tuple[str, Action, str | None]] = [
            (
                "reward_hacking",
                monitor.reward_hacking,
                hacking(account.rewards, account.readings, monitor.window),
            ),
            ("spread_collapse", monitor.spread_collapse, collapsed(account.spreads, monitor.spread_fraction)),
        ]
        for kind, action, words in alarms:
            if words is not None and self.ended_at is None:
                self._alarm(step, kind, action, words)
        if "rollback" in (monitor.reward_hacking, monitor.spread_collapse) and not any(
            words for _, _, words in alarms
        ):
            account.good = step
            self.save(step)

    def _alarm(self, step: int, kind: str, action: Action, words: str) -> None:
        text = f"{self.stage.name}, step {step}: {kind}: {words}"
        self._record(step, {f"alarm/{kind}": 1.0})
        if action == "stop":
            raise TrainingError(f"{text} (monitor.{kind}: stop)")
        self.account.alarms.append(text)
        self.console.print(f"[yellow]{text}[/yellow]", highlight=False)
        good = self.account.good
        if action == "warn" or good is None:
            return
        folder, alarms = self.folder / "checkpoints", self.account.alarms
        with self.world.main_first():
            for later in checkpoint.saved(folder):
                if int(later.name.removeprefix("step-")) > good:
                    shutil.rmtree(later)
        _, extra = checkpoint.restore(checkpoint.saved(folder)[-1], self.policy, self.strategy)
        self.account, self.ended_at = Account(**{**extra, "alarms": alarms}), good
        self.console.print(f"[yellow]{self.stage.name}: rolled back to step {good}, where it ends[/yellow]")

    def _record(
        self, step: int, metrics: dict[str, float], histograms: dict[str, list[float]] | None = None
    ) -> None:
        if self.tracker is not None:
            self.tracker.log(step, metrics, histograms)

    def _spent(self) -> int:
        """Forward-equivalents of all processes."""
        return sum(self.world.gather_objects(self.policy.forward_equivalents))

    def _pause(self) -> None:
        passed = time.monotonic() - self.since
        self.account.seconds += passed
        self.here += passed

    def _go_on(self) -> None:
        self.since = time.monotonic()
