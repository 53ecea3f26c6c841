"""How does one stage of a recipe run: from the weights it starts from to the artifact it writes?"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain import checkpoint
from posttrain.algorithm import Batch, Tools
from posttrain.artifact import DESCRIPTION
from posttrain.data.prompts import prompt_rows
from posttrain.device import peak_memory, reset_peak_memory
from posttrain.errors import TrainingError
from posttrain.feeds import Feed, feed_of
from posttrain.grids import grid
from posttrain.judge import Judge
from posttrain.model import FlowModel
from posttrain.policy import Policy
from posttrain.progress import StageProgress, stage_progress
from posttrain.records import Tracker
from posttrain.sampling import sample_images
from posttrain.trainer import EMA, REFERENCE, adamw, train

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.recipe import Recipe, Stage

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
SHOWN = 8
"""Prompts in a stage's image grids."""


def run_stage(
    recipe: Recipe,
    stage: Stage,
    model: FlowModel,
    run: Path,
    description: dict,
    console: Console,
    reference: dict[str, Tensor] | None = None,
) -> None:
    """Train ``model``, which holds the weights the stage starts from, and publish ``run/<stage>/final``.

    ``description`` (see :mod:`posttrain.artifact`) goes into the artifact. ``reference`` holds the
    transformer's weights that the reference role stands for, by name, where they are not those. Goes on
    from the last checkpoint where there is one. ``stage.json``, written last, says that the stage is
    finished. Raises PosttrainError (data, training, disk) with the last good checkpoint untouched.
    """
    folder, settings, device = run / stage.name, stage.train, model.device
    folder.mkdir(parents=True, exist_ok=True)
    stage.tune.apply(model.transformer, recipe.seed)
    if settings.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    policy = Policy(model, autocast=AUTOCAST[settings.precision], chunk=max(settings.micro_batch, 1))
    for role in stage.algorithm.roles | ({EMA} if settings.ema is not None else set()):
        weights = None
        if role == REFERENCE and reference is not None:
            weights = policy.named(reference)
        policy.add_role(role, weights, moves=role != REFERENCE)
    optimizer = adamw(policy, settings)
    reset_peak_memory(device)

    start, extra = 0, {"samples": 0, "seconds": 0.0, "next_batch": 0}
    if found := checkpoint.saved(folder / "checkpoints"):
        start, extra = checkpoint.restore(found[-1], policy, optimizer)
        console.print(f"[dim]{stage.name}: going on after step {start}[/dim]", highlight=False)
    feed = feed_of(stage, model, run / "data")
    for note in feed.notes:
        console.print(f"[dim]{stage.name}: {note}[/dim]", highlight=False)
    with (
        Tracker(folder, resume_step=start, tensorboard=recipe.tracker == "tensorboard") as tracker,
        stage_progress(stage.name, settings.steps, start, console) as bar,
        Judge(model, stage.rewards, folder / "failed_reward") as judge,
    ):
        watch = StageWatch(recipe, stage, policy, optimizer, folder, tracker, bar, start, extra, feed, judge)
        if start < settings.steps:
            train(stage.algorithm, policy, optimizer, watch.batches(), settings, watch, start)
        watch.finish()
    with (
        policy.using(EMA if settings.ema is not None else None),
        checkpoint.published(folder / "final") as part,
    ):
        if stage.tune.type == "lora":
            model.save_lora(part)
        else:
            model.save(part, stage.export_dtype)
        (part / DESCRIPTION).write_text(json.dumps(description, indent=2))
    (folder / "stage.json").write_text(json.dumps(watch.account(), indent=2))


def samples_shown(recipe: Recipe, feed: Feed) -> tuple[list[str], dict[str, Any]]:
    """The prompts of a stage's image grids, and how :func:`posttrain.sampling.sample_images` draws them."""
    if (evaluation := recipe.evaluation) is not None:
        prompts = [row["prompt"] for row in prompt_rows(evaluation.prompts)]
        settings = evaluation.model_dump(include={"resolution", "steps", "guidance", "solver", "seed"})
    else:
        prompts = feed.prompts
        settings = {"resolution": feed.size[0], "steps": 40, "guidance": 4.5}
    return list(dict.fromkeys(prompts))[:SHOWN], settings


class StageWatch:
    """What happens around the steps of a stage: samples, checkpoints, records, and the bill."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        tracker: Tracker,
        bar: StageProgress,
        start: int,
        extra: dict,
        feed: Feed,
        judge: Judge,
    ) -> None:
        self.recipe, self.stage, self.policy, self.optimizer = recipe, stage, policy, optimizer
        self.folder, self.tracker, self.bar = folder, tracker, bar
        self.feed, self.judge = feed, judge
        self.start = start
        self.samples, self.seconds, self.next_batch = extra["samples"], extra["seconds"], extra["next_batch"]
        self.since = time.monotonic()
        self.before, self.here = self.samples, 0.0
        self.shown, self.sampler = samples_shown(recipe, feed)

    def batches(self) -> Iterator[tuple[Batch, Tools]]:
        """The batches that are still to come, each with the tools to collect it."""
        recipe, model = self.recipe, self.policy.model
        key = (recipe.seed, recipe.depth(self.stage))
        for number, batch, draws in self.feed.batches(key, self.next_batch):
            # a batch that cannot be used is passed over, so this is not the optimizer's step
            self.next_batch = number + 1
            sigmas = functools.partial(model.sigmas, height=self.feed.size[0], width=self.feed.size[1])
            yield batch, Tools(self.policy, draws, sigmas, self.judge)

    def before_batch(self, step: int) -> bool:
        settings = self.stage.train
        self._pause()
        if settings.sample_every and step % settings.sample_every == 0:
            self._sample(step)
        if step > self.start and step % settings.checkpoint_every == 0:
            self.save(step)
        self._go_on()
        return True

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        self.samples += samples
        if step % self.stage.train.log_every and step not in (1, self.stage.train.steps):
            return
        values = {name: value.item() for name, value in metrics.items() if value.ndim == 0}
        histograms = {name: value.tolist() for name, value in metrics.items() if value.ndim == 1}
        self._pause()
        rate = (self.samples - self.before) / max(self.here, 1e-9)
        values |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "images_per_second": rate}
        values["forward_equivalents"] = self.policy.forward_equivalents
        self.tracker.log(step, values, histograms)
        self.bar.update(step, loss=values.get("loss"), images_per_second=rate)
        self._go_on()

    def finish(self) -> None:
        """Show and save the trained weights: the last step always is."""
        self._pause()
        if self.stage.train.sample_every:
            self._sample(self.stage.train.steps)
        self.save(self.stage.train.steps)

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after ``step`` steps, unless there is one."""
        folder = self.folder / "checkpoints"
        if not any(p.name == f"step-{step:08d}" for p in checkpoint.saved(folder)):
            extra = {"samples": self.samples, "seconds": self.seconds, "next_batch": self.next_batch}
            checkpoint.save(
                folder, step, self.policy, self.optimizer, extra, self.stage.train.keep_checkpoints
            )

    def account(self) -> dict:
        """What the stage cost and did, for ``stage.json``. Raises TrainingError where nothing was trained."""
        if not self.samples or not self.policy.trained:
            raise TrainingError(f"stage {self.stage.name!r} trained nothing")
        return {
            "steps": self.stage.train.steps,
            "samples": self.samples,
            "seconds": self.seconds,
            "forward_equivalents": self.policy.forward_equivalents,
            "images_per_second": self.samples / self.seconds,
            "peak_memory_bytes": peak_memory(self.policy.model.device),
            "trainable_parameters": sum(p.numel() for p in self.policy.trained.values()),
            "skipped": self.feed.skipped(),
        }

    def _sample(self, step: int) -> None:
        """Draw the same prompts from the same noise, with the weights that would be exported."""
        spent = self.policy.forward_equivalents
        with self.policy.using(EMA if EMA in self.policy.roles else None):
            images = sample_images(self.policy, self.shown, [0] * len(self.shown), **self.sampler)
        self.policy.forward_equivalents = spent
        picture = grid(images.cpu(), 4, captions=self.shown)
        (self.folder / "samples").mkdir(exist_ok=True)
        picture.save(self.folder / "samples" / f"step-{step:08d}.png")
        self.tracker.image("samples", step, picture)

    def _pause(self) -> None:
        passed = time.monotonic() - self.since
        self.seconds += passed
        self.here += passed

    def _go_on(self) -> None:
        self.since = time.monotonic()
