"""How does one stage of a recipe run: from the weights it starts from to the artifact it writes?"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.markup import escape
from torch import Tensor

from posttrain.data.batches import BatchSource, batch_source_of
from posttrain.distributed.world import ALONE, World
from posttrain.engine import checkpoint
from posttrain.engine.compiling import compile_blocks
from posttrain.engine.micro_batch import described, found_by_trying
from posttrain.engine.tracker import Tracker
from posttrain.engine.trainer import EMA, REFERENCE, train
from posttrain.engine.trial import blank
from posttrain.errors import TrainingError
from posttrain.model import FlowModel, torch_dtype
from posttrain.policy.activations import checkpoint_blocks
from posttrain.policy.out_of_memory import OutOfMemory
from posttrain.policy.policy import Policy
from posttrain.scoring.judge import Judge
from posttrain.stages.caches import fill_for_stage
from posttrain.stages.lineage import DESCRIPTION
from posttrain.stages.micro_batch import remember, settled
from posttrain.stages.watch import Account, StageWatch
from posttrain.support.device import reset_peak_memory
from posttrain.support.files import published, write
from posttrain.support.progress import stage_progress

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.parallel.strategy import Strategy
    from posttrain.recipe.schema import Recipe, Stage

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


def run_stage(
    recipe: Recipe,
    stage: Stage,
    model: FlowModel,
    run: Path,
    description: dict,
    console: Console,
    reference: dict[str, Tensor] | None = None,
    world: World = ALONE,
) -> None:
    """Train ``model``, which holds the weights the stage starts from, and publish ``run/<stage>/final``.

    Every process of ``world`` calls it with the same arguments, and the main one writes.
    ``description`` (see :mod:`posttrain.stages.artifact`) goes into the artifact. ``reference`` holds the
    transformer's weights that the reference role stands for, by name, where they are not those; it is
    emptied. Goes on from the last checkpoint where there is one. ``stage.json``, written last, says that
    the stage is finished. Raises PosttrainError (data, training, disk) with the last good checkpoint
    untouched.
    """
    folder, settings, device = run / stage.name, stage.train, model.device
    folder.mkdir(parents=True, exist_ok=True)
    stage.tune.apply(model.transformer, recipe.seed)
    checkpoint_blocks(model.transformer, settings.gradient_checkpointing)
    number = world.broadcast(settled(recipe, stage, folder, world.size))
    chunk = 1 if number is None else number
    policy = Policy(model, autocast=AUTOCAST[settings.precision], micro_batch=chunk)
    named = policy.named(reference) if reference is not None else None
    strategy = recipe.parallel.prepare(policy, settings, world)
    policy.layout = strategy.layout
    # in one order: a set's differs between processes, and tensors of roles are gathered one by one
    for role in sorted(stage.algorithm.roles | ({EMA} if settings.ema is not None else set())):
        policy.add_role(role, named if role == REFERENCE else None, moves=role != REFERENCE)
    for whole in (reference, named):
        if whole is not None:
            whole.clear()  # the role has its part of each
    reset_peak_memory(device)

    start, account = 0, Account()
    if found := checkpoint.saved(folder / "checkpoints"):
        start, extra = checkpoint.restore(found[-1], policy, strategy)
        account = Account(**extra)
        console.print(f"[dim]{stage.name}: going on after step {start}[/dim]", highlight=False)
    with world.main_first():
        feed = _feed(stage, model, run / "data", world)
    for note in feed.notes:
        console.print(f"[dim]{stage.name}: {note}[/dim]", highlight=False)
    fill_for_stage(recipe, stage, model, feed, console, world)
    failures = folder / ("failed_reward" if world.is_main else f"failed_reward-{world.rank}")
    with (
        Tracker(folder, resume_step=start, tensorboard=recipe.tracker == "tensorboard")
        if world.is_main
        else contextlib.nullcontext() as tracker,
        stage_progress(stage.name, settings.steps, start, console) as bar,
        Judge(model, stage.rewards, failures) as judge,
    ):
        try:
            if settings.compile or number is None:
                _try_out(recipe, stage, policy, strategy, feed, folder, console, search=number is None)
            watch = StageWatch(
                recipe, stage, policy, strategy, folder, tracker, bar, account, feed, judge, console
            )
            train(stage.algorithm, policy, strategy, watch.batches(), settings, watch, start)
            watch.finish()
        except OutOfMemory as error:
            remember(recipe, folder, world.size, error.micro_batch)
            words = f"{stage.name}: {error}. The same command goes on from the last checkpoint with"
            raise TrainingError(f"{words} {error.micro_batch}") from error
    summary = watch.summary()  # which refuses a stage that trained nothing, before it is published
    weights = {
        name: _own(tensor.cpu() if world.size > 1 else tensor)
        for name, tensor in policy.whole(EMA if settings.ema is not None else None)
        if world.is_main
    }
    strategy.close()
    if world.is_main:
        dtype = torch_dtype(stage.export_dtype) if stage.tune.type == "full" else torch.float32
        needs = dtype.itemsize * sum(tensor.numel() for tensor in weights.values())
        with published(folder / "final", needs) as part:
            if stage.tune.type == "lora":
                model.save_lora(part, weights)
            else:
                model.save(part, stage.export_dtype, weights)
            (part / DESCRIPTION).write_text(json.dumps(description, indent=2))
        write(folder / "stage.json", json.dumps(summary, indent=2))
    world.barrier()


def _feed(stage: Stage, model: FlowModel, work: Path, world: World) -> BatchSource:
    size, groups = stage.train.batch_size, stage.algorithm.samples_per_prompt
    return batch_source_of(stage.data, model, work, size, groups, stage.rewards, world)


def _try_out(
    recipe: Recipe,
    stage: Stage,
    policy: Policy,
    strategy: Strategy,
    feed: BatchSource,
    folder: Path,
    console: Console,
    *,
    search: bool,
) -> None:
    """Compile the blocks where the recipe says so, and ``search`` how many items to take at a time."""
    sample, world = blank(policy.model, feed), strategy.world
    if stage.train.compile and (reason := compile_blocks(policy, strategy, sample)) is not None:
        words = f"{stage.name}: compile: the blocks run as they are ({escape(reason)})"
        console.print(f"[yellow]{words}[/yellow]", highlight=False, soft_wrap=True)
    if search:
        policy.micro_batch, trials = found_by_trying(stage.algorithm, stage.train, policy, strategy, sample)
        line = f"[dim]{stage.name}: {described(trials, policy.model.device)}[/dim]"
        console.print(line, highlight=False, soft_wrap=True)
        if world.is_main:
            remember(recipe, folder, world.size, policy.micro_batch, trials)


def _own(tensor: Tensor) -> Tensor:
    """``tensor`` in memory of its own: what is a part of a larger one cannot be written as safetensors."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
