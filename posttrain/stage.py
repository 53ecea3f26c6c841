"""How does one stage of a recipe run: from the weights it starts from to the artifact it writes?"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain import checkpoint
from posttrain.algorithm import Batch
from posttrain.artifact import DESCRIPTION
from posttrain.data.loader import ImageBatch, ImageSource
from posttrain.device import peak_memory, reset_peak_memory
from posttrain.errors import TrainingError
from posttrain.grids import grid
from posttrain.model import FlowModel
from posttrain.policy import Policy
from posttrain.progress import StageProgress, stage_progress
from posttrain.randomness import Draws
from posttrain.records import Tracker
from posttrain.sampling import encode, sample_images
from posttrain.trainer import EMA, adamw, train

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.recipe import Recipe, Stage

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
SHOWN = 8
"""Prompts in a stage's image grids."""


def run_stage(
    recipe: Recipe, stage: Stage, model: FlowModel, run: Path, description: dict, console: Console
) -> None:
    """Train ``model``, which holds the weights the stage starts from, and publish ``run/<stage>/final``.

    ``description`` (see :mod:`posttrain.artifact`) goes into the artifact. Goes on from the last checkpoint
    where there is one. ``stage.json``, written last, says that the stage is finished. Raises PosttrainError
    (data, training, disk) with the last good checkpoint untouched.
    """
    folder, settings, device = run / stage.name, stage.train, model.device
    folder.mkdir(parents=True, exist_ok=True)
    stage.tune.apply(model.transformer, recipe.seed)
    if settings.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    policy = Policy(model, autocast=AUTOCAST[settings.precision], chunk=max(settings.micro_batch, 1))
    for role in stage.algorithm.roles | ({EMA} if settings.ema is not None else set()):
        policy.add_role(role)
    optimizer = adamw(policy, settings)
    reset_peak_memory(device)

    start, extra = 0, {"samples": 0, "seconds": 0.0, "next_batch": 0}
    if found := checkpoint.saved(folder / "checkpoints"):
        start, extra = checkpoint.restore(found[-1], policy, optimizer)
        console.print(f"[dim]{stage.name}: going on after step {start}[/dim]", highlight=False)
    source = ImageSource(stage.data.materialise(run / "data"), divisor=model.divisor)
    for note in source.notes:
        console.print(f"[dim]{stage.name}: {note}[/dim]", highlight=False)
    with (
        Tracker(folder, resume_step=start, tensorboard=recipe.tracker == "tensorboard") as tracker,
        stage_progress(stage.name, settings.steps, start, console) as bar,
    ):
        watch = StageWatch(recipe, stage, policy, optimizer, folder, tracker, bar, start, extra, source)
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


def encoded(images: ImageBatch, model: FlowModel, draws: Draws) -> Batch:
    """Images and captions as the model's latents and conditions; the encoder's noise comes from ``draws``."""
    height, width = images.pixels.shape[-2:]
    noise = draws.normal("posterior", model.latent_shape(height, width))
    conditions, rows = encode(model, images.captions)
    return Batch(model.encode_images(images.pixels, noise), rows, conditions)


def samples_shown(recipe: Recipe, source: ImageSource, divisor: int) -> tuple[list[str], dict[str, Any]]:
    """The prompts of a stage's image grids, and how :func:`posttrain.sampling.sample_images` draws them."""
    from posttrain.evaluate import prompt_rows

    if (evaluation := recipe.evaluation) is not None:
        prompts = [row["prompt"] for row in prompt_rows(evaluation)]
        settings = evaluation.model_dump(include={"resolution", "steps", "guidance", "solver", "seed"})
    else:
        prompts = [record.caption for record in source.records.values()]
        width, height = next(iter(source.buckets))
        side = round((width * height) ** 0.5 / divisor) * divisor
        settings = {"resolution": side, "steps": 40, "guidance": 4.5}
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
        source: ImageSource,
    ) -> None:
        self.recipe, self.stage, self.policy, self.optimizer = recipe, stage, policy, optimizer
        self.folder, self.tracker, self.bar, self.source = folder, tracker, bar, source
        self.start = start
        self.samples, self.seconds, self.next_batch = extra["samples"], extra["seconds"], extra["next_batch"]
        self.since = time.monotonic()
        self.before, self.here = self.samples, 0.0
        self.shown, self.sampler = samples_shown(recipe, source, policy.model.divisor)

    def batches(self) -> Iterator[tuple[Batch, Draws]]:
        """The encoded batches that are still to come, each with its draws."""
        recipe, model = self.recipe, self.policy.model
        key = (recipe.seed, recipe.depth(self.stage))
        for images in self.source.batches(self.stage.train.batch_size, key, self.next_batch):
            # a batch none of whose images can be read is passed over, so this is not the optimizer's step
            self.next_batch = images.step + 1
            draws = Draws((*key, images.step), images.ids, model.device)
            yield encoded(images, model, draws), draws

    def before_step(self, step: int) -> None:
        settings = self.stage.train
        self._pause()
        if settings.sample_every and step % settings.sample_every == 0:
            self._sample(step)
        if step > self.start and step % settings.checkpoint_every == 0:
            self.save(step)
        self._go_on()

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        self.samples += samples
        if step % self.stage.train.log_every and step not in (1, self.stage.train.steps):
            return
        values = {name: value.item() for name, value in metrics.items()}
        self._pause()
        rate = (self.samples - self.before) / max(self.here, 1e-9)
        values |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "images_per_second": rate}
        values["forward_equivalents"] = self.policy.forward_equivalents
        self.tracker.log(step, values)
        self.bar.update(step, loss=values["loss"], images_per_second=rate)
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
            "skipped": [str(problem) for problem in self.source.skipped],
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
