"""Runs one stage of a recipe: prepares it, trains, and publishes the result."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from posttrain.algorithm import Batch, Tools
from posttrain.engine.micro_batch import items_in_step, largest_micro_batch, trials_in_words
from posttrain.engine.modes import enter, fastest, in_words
from posttrain.engine.rehearsal import rehearse
from posttrain.engine.service import PACKAGES, Labels, Service, flat
from posttrain.engine.tracker import Tracker
from posttrain.engine.trainer import train
from posttrain.engine.trial import Sample, blank
from posttrain.errors import TrainingError
from posttrain.policy.out_of_memory import OutOfMemory
from posttrain.scoring.judge import Judge
from posttrain.stages.micro_batch import remember, remember_modes
from posttrain.stages.prepare import prepare
from posttrain.stages.publish import publish
from posttrain.stages.stage_run import StageRun, Training
from posttrain.stages.watch import StageWatch
from posttrain.support.progress import stage_progress
from posttrain.support.stopping import deferred


def run_stage(run: StageRun, description: dict[str, Any], reference: dict[str, Tensor] | None = None) -> None:
    """Train ``run.model`` from the weights it holds, and publish ``runs/NAME/STAGE/final``.

    Every process calls it with the same arguments, and the main one writes. A stage that has a checkpoint
    goes on from the last one. ``description`` (see :mod:`posttrain.stages.lineage`) goes into the artifact.
    ``reference``: name -> weight of the transformer for the reference role, on the CPU, where they are not
    the weights the stage starts from; it is emptied. Raises PosttrainError (data, training, disk) and leaves
    the last checkpoint as it was.
    """
    training = prepare(run, reference)
    if training.account.ended_at is None:  # else an alarm ended it before, and it is published again
        _train(training)
    publish(training, description)


def _train(training: Training) -> None:
    """Take the stage's optimizer steps, with its hooks around them."""
    run, start = training.run, training.start
    stage, settings, is_main = run.stage, run.stage.train, run.world.is_main
    failures = run.folder / ("failed_reward" if is_main else f"failed_reward-{run.world.rank}")
    with (
        _tracker(training) if is_main else contextlib.nullcontext() as tracker,
        stage_progress(stage.name, settings.steps, start, run.console) as bar,
        Judge(run.model, stage.rewards, failures) as judge,
        training.checkpoints,
    ):
        try:
            _choose_mode(training)
            watch, batches = StageWatch(training, tracker, bar, judge), _batches(training, judge)
            with deferred(), watch.stopping():
                train(stage.algorithm, training.policy, training.strategy, batches, settings, watch, start)
                watch.finish()
        except OutOfMemory as error:
            remember(run.recipe, run.folder, run.world.size, error.micro_batch)
            raise TrainingError(
                f"{stage.name}: {error}. The same command goes on from the last checkpoint with "
                f"{error.micro_batch}"
            ) from error


def _tracker(training: Training) -> Tracker:
    """Where the stage's curves go. Raises TrainingError where a tracking service does not start."""
    run, kind = training.run, training.run.recipe.tracker
    service = None
    if kind in PACKAGES:
        labels = Labels(
            run.recipe.name,
            f"{run.run_folder.name}/{run.stage.name}",
            flat(run.stage.model_dump(mode="json")),
        )
        service = Service(kind, run.folder, labels, run.warn)
    return Tracker(
        run.folder,
        resume_step=training.start,
        rows=training.account.rows,
        tensorboard=kind == "tensorboard",
        service=service,
    )


def _choose_mode(training: Training) -> None:
    """Let the blocks compute in the stage's mode; find it and the micro-batch where the recipe says ``auto``.

    Trying needs an empty sample.
    """
    mode, run = training.mode, training.run
    needs_sample = mode is None or mode.compiled or training.search_micro_batch
    sample = blank(run.model, training.source) if needs_sample else None
    if mode is None and sample is not None:
        _find_mode(training, sample)
        return
    assert mode is not None, "else there is a sample"
    if mode.compiled:
        run.note(f"{run.stage.name}: compiling the blocks; the first steps are slow")
    elif isinstance(mode.checkpointing, float):
        share = f"gradient_checkpointing {mode.checkpointing:g}"
        run.note(f"{run.stage.name}: compile auto is false on this device, so {share} acts as selective")
    rows = _rows_at_once(training) if mode.compiled else 1
    if (reason := enter(mode, training.policy, training.strategy, sample, rows)) is not None:
        run.warn(_uncompiled(run.stage.name, reason))
    if training.search_micro_batch and sample is not None:
        _find_micro_batch(training, sample)


def _rows_at_once(training: Training) -> int:
    """The rows of a micro-batch, so that no other size is compiled first; 1 if it is still to be found."""
    if training.search_micro_batch:
        return 1
    stage, policy = training.run.stage, training.policy
    items = min(policy.micro_batch, items_in_step(stage.algorithm, stage.train, training.strategy))
    return items * rehearse(stage.algorithm, policy.model.guidance_rule).rows_with


def _uncompiled(name: str, reason: str) -> str:
    return f"{name}: compile: the blocks run as they are ({reason})"


def _find_mode(training: Training, sample: Sample) -> None:
    """Find the mode and the micro-batch by trying, and remember them for when the run is resumed."""
    run, stage, policy = training.run, training.run.stage, training.policy
    settings, steps = stage.train, stage.train.steps - training.start
    if not training.search_micro_batch:  # more may have run out of memory before
        settings = settings.model_copy(update={"micro_batch": policy.micro_batch})

    def tell(reason: str) -> None:
        run.warn(_uncompiled(stage.name, reason))

    run.note(f"{stage.name}: trying what is fastest, for about two minutes at most")
    found = fastest(stage.algorithm, settings, policy, training.strategy, sample, steps, tell=tell)
    policy.micro_batch = found[0].micro_batch
    run.note(f"{stage.name}: {in_words(found, run.model.device)}")
    if run.world.is_main:
        remember_modes(run.recipe, stage, run.folder, run.world.size, found)


def _find_micro_batch(training: Training, sample: Sample) -> None:
    """Find the micro-batch by trying, and remember it for when the run is resumed."""
    run, stage, policy = training.run, training.run.stage, training.policy
    size = largest_micro_batch(stage.algorithm, stage.train, policy, training.strategy, sample)
    policy.micro_batch = size.items
    run.note(f"{stage.name}: {trials_in_words(size.trials, run.model.device)}")
    if run.world.is_main:
        remember(run.recipe, run.folder, run.world.size, size.items, size.trials)


def _batches(training: Training, judge: Judge) -> Iterator[tuple[Batch, Tools]]:
    """The batches still to come, each with the tools to collect it. Notes in the account how far they are."""
    run, source, account = training.run, training.source, training.account
    height, width = source.size
    sigmas = functools.partial(run.model.sigmas, height=height, width=width)
    key = (run.recipe.seed, run.recipe.depth(run.stage))
    for number, batch, draws in source.batches(key, account.next_batch):
        account.next_batch = number + 1
        yield batch, Tools(training.policy, draws, sigmas, judge, run.world)
