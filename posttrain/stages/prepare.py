"""Prepares a stage for training: policy, strategy, roles, checkpoint, data and caches."""

from __future__ import annotations

from torch import Tensor

from posttrain.data.batches import BatchSource, batch_source_of
from posttrain.engine import checkpoint
from posttrain.engine.trainer import EMA, REFERENCE
from posttrain.parallel.strategy import Strategy
from posttrain.policy.policy import Policy
from posttrain.policy.precision import AUTOCAST
from posttrain.stages.account import Account
from posttrain.stages.caches import fill_for_stage
from posttrain.stages.micro_batch import settled, settled_mode
from posttrain.stages.stage_run import StageRun, Training
from posttrain.support.device import bf16_problem, reset_peak_memory


def prepare(run: StageRun, reference: dict[str, Tensor] | None) -> Training:
    """Make everything that the stage trains with, restored from its last checkpoint where there is one.

    ``reference``: see :func:`posttrain.stages.stage.run_stage`. Raises PosttrainError.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.stage.train.precision == "bf16" and (reason := bf16_problem(run.model.device)) is not None:
        run.warn(f"{run.stage.name}: {reason}")
    micro_batch = run.world.broadcast(settled(run.recipe, run.stage, run.folder, run.world.size))
    mode = run.world.broadcast(settled_mode(run.recipe, run.stage, run.folder, run.world.size))
    policy, strategy = _prepare_policy(run, 1 if micro_batch is None else micro_batch, reference)
    reset_peak_memory(run.model.device)
    start, account = _restore(run, policy, strategy)
    source = _open_source(run)
    fill_for_stage(run.recipe, run.stage, run.model, source, run.console, run.world)
    return Training(
        run, policy, strategy, source, account, start, mode, search_micro_batch=micro_batch is None
    )


def _prepare_policy(
    run: StageRun, micro_batch: int, reference: dict[str, Tensor] | None
) -> tuple[Policy, Strategy]:
    """The policy with its roles, under the recipe's strategy. Empties ``reference``."""
    stage, settings, transformer = run.stage, run.stage.train, run.model.transformer
    stage.tune.apply(transformer, run.recipe.seed)
    policy = Policy(run.model, autocast=AUTOCAST[settings.precision], micro_batch=micro_batch)
    trained_reference = policy.beside_adapters(reference) if reference is not None else None
    strategy = run.recipe.parallel.prepare(policy, settings, run.world)
    policy.layout = strategy.layout
    roles = stage.algorithm.roles | ({EMA} if settings.ema is not None else set())
    # sorted: a set's order differs between processes, which gather the tensors of roles one by one
    for role in sorted(roles):
        policy.add_role(role, trained_reference if role == REFERENCE else None, moves=role != REFERENCE)
    for weights in (reference, trained_reference):
        if weights is not None:
            weights.clear()  # the role has copied its shard of each
    return policy, strategy


def _restore(run: StageRun, policy: Policy, strategy: Strategy) -> tuple[int, Account]:
    """Load the last checkpoint; returns the number of finished steps, and the account."""
    if not (checkpoints := checkpoint.saved(run.folder / "checkpoints")):
        return 0, Account()
    start, kept = checkpoint.restore(checkpoints[-1], policy, strategy)
    run.note(f"{run.stage.name}: going on after step {start}")
    return start, Account(**kept)


def _open_source(run: StageRun) -> BatchSource:
    """The stage's data. The main process comes first, since it may have to render them."""
    stage, world = run.stage, run.world
    batch_size, group_size = stage.train.batch_size, stage.algorithm.samples_per_prompt
    with world.main_first():
        source = batch_source_of(
            stage.data, run.model, run.run_folder / "data", batch_size, group_size, stage.rewards, world
        )
    for note in source.notes:
        run.note(f"{stage.name}: {note}")
    return source
