"""Prepares a stage for training: policy, strategy, roles, checkpoint, data and caches."""

from __future__ import annotations

from torch import Tensor

from posttrain.data.family import Opening
from posttrain.data.source import BatchSource
from posttrain.engine.checkpoint_folder import CheckpointFolder
from posttrain.engine.trainer import EMA, REFERENCE
from posttrain.parallel.strategy import Strategy
from posttrain.policy.policy import Policy
from posttrain.policy.precision import AUTOCAST
from posttrain.recipe.deciding import fingerprint, former_fingerprint
from posttrain.stages.account import Account
from posttrain.stages.caches import fill_for_stage
from posttrain.stages.made_from import confirm_data
from posttrain.stages.micro_batch import set_damaged_aside, settled, settled_mode
from posttrain.stages.stage_run import StageRun, Training
from posttrain.support.device import bf16_problem, reset_peak_memory


def prepare(run: StageRun, reference: dict[str, Tensor] | None) -> Training:
    """Make everything that the stage trains with, restored from its last checkpoint where there is one.

    ``reference``: see :func:`posttrain.stages.stage.run_stage`. Raises PosttrainError.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    if run.stage.train.precision == "bf16" and (reason := bf16_problem(run.model.device)) is not None:
        run.warn(f"{run.stage.name}: {reason}")
    if run.world.is_main:
        set_damaged_aside(run.folder, run.note)
    micro_batch = run.world.broadcast(settled(run.recipe, run.stage, run.folder, run.world.size))
    mode = run.world.broadcast(settled_mode(run.recipe, run.stage, run.folder, run.world.size))
    policy, strategy = _prepare_policy(run, 1 if micro_batch is None else micro_batch, reference)
    reset_peak_memory(run.model.device)
    checkpoints = CheckpointFolder(
        run.folder / "checkpoints",
        policy,
        strategy,
        fingerprint(run.recipe, run.stage.name),
        tell=lambda text: run.warn(f"{run.stage.name}: {text}"),
        former=[former_fingerprint(run.recipe, run.stage.name)],
    )
    start, account = _restore(run, checkpoints)
    source = _open_source(run)
    confirm_data(run, source, start)
    fill_for_stage(run.recipe, run.stage, run.model, source, run.console, run.world)
    search = micro_batch is None
    return Training(run, policy, strategy, source, checkpoints, account, start, mode, search)


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


def _restore(run: StageRun, checkpoints: CheckpointFolder) -> tuple[int, Account]:
    """Load the newest whole checkpoint; returns the number of finished steps, and the account."""
    if (restored := checkpoints.restore()) is None:
        return 0, Account()
    account = Account(**{"rows": None, **restored.extra})
    if run.ended is not None and run.ended.step == restored.step:
        account.ended_at, account.alarms = run.ended.step, run.ended.alarms
    else:
        run.note(f"{run.stage.name}: going on after step {restored.step}")
    return restored.step, account


def _open_source(run: StageRun) -> BatchSource:
    """The stage's data. The main process comes first, since it may have to render them."""
    stage, world = run.stage, run.world
    batch_size, group_size = stage.train.batch_size, stage.algorithm.samples_per_prompt
    with world.main_first():
        source = stage.data.open(
            Opening(run.model, run.run_folder / "data", batch_size, group_size, stage.rewards, world)
        )
    for note in source.notes:
        run.note(f"{stage.name}: {note}")
    return source
