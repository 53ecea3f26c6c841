"""Writes a stage's training state, and restores it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.distributed.world import World
from posttrain.errors import PosttrainError
from posttrain.parallel.strategy import Strategy
from posttrain.policy.policy import Policy
from posttrain.support.files import published

STATE = "state.pt"


def save(
    folder: Path,
    step: int,
    policy: Policy,
    strategy: Strategy,
    extra: dict[str, Any],
    keep: int,
    protected: int | None = None,
) -> Path:
    """Write the complete training state after ``step`` steps.

    Every process calls it, and the main one writes. Tensors are whole and stored by the weight's name, so
    the state can be restored under any strategy, on any number of processes. Of the checkpoints in
    ``folder``, the last ``keep`` stay, and the one of step ``protected``. ``extra`` is stored as it is given.
    """
    target, world = folder / f"step-{step:08d}", strategy.world
    state = _state(step, policy, strategy, extra)
    if world.is_main:
        with published(target, _bytes(state)) as part:
            torch.save(state, part / STATE)
        for old in saved(folder)[:-keep]:
            if old.name != f"step-{protected if protected is not None else -1:08d}":
                shutil.rmtree(old)
    world.barrier()
    return target


def saved(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / STATE).is_file())


def read(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """What :func:`save` wrote. Raises PosttrainError if it cannot be read."""
    try:
        return torch.load(checkpoint / STATE, map_location=device, weights_only=True, mmap=True)
    except Exception as error:
        raise PosttrainError(
            f"cannot read the checkpoint {str(checkpoint)!r}: {error}. Remove it to continue from the one "
            "before"
        ) from error


def restore(checkpoint: Path, policy: Policy, strategy: Strategy) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint into ``policy`` and ``strategy``; return its step and the stage's ``extra``.

    Raises PosttrainError if it cannot be read or holds other weights than the policy trains.
    """
    # memory-mapped on the CPU: a process with sharded weights reads only its own shards
    state = read(checkpoint, torch.device("cpu"))
    trained, stored = policy.trained, state["trained"]
    if trained.keys() != stored.keys() or any(
        strategy.layout.shape(trained[name]) != stored[name].shape for name in trained
    ):
        raise PosttrainError(
            f"the checkpoint {str(checkpoint)!r} holds other weights than this stage trains "
            f"({len(stored)} tensors, not {len(trained)}, or other shapes: another LoRA rank?)"
        )
    for role, weights in {None: stored, **state["roles"]}.items():
        policy.load(role, weights)
    strategy.mark_loaded()
    strategy.load_moments({name: moments for name, moments in state["optimizer"].items() if moments})
    # records show the sum over all processes, so only one process may have the stored sum
    policy.forward_equivalents = state["forward_equivalents"] if strategy.world.is_main else 0
    return state["step"], state["extra"]


def _state(step: int, policy: Policy, strategy: Strategy, extra: dict[str, Any]) -> dict[str, Any]:
    """The state to be written; on processes that do not write, None in the place of each tensor."""
    world = strategy.world
    moving = [role for role in policy.roles if role not in policy.static]
    return {
        "step": step,
        "trained": {name: _kept(tensor, world) for name, tensor in policy.gathered_weights(None)},
        "roles": {
            role: {name: _kept(tensor, world) for name, tensor in policy.gathered_weights(role)}
            for role in moving
        },
        "optimizer": {
            name: {key: _kept(value, world) for key, value in strategy.moments(name).items()}
            for name in policy.trained
        },
        "forward_equivalents": sum(world.gather_objects(policy.forward_equivalents)),
        "extra": extra,
    }


def _kept(tensor: Tensor, world: World) -> Tensor | None:
    if not world.is_main:
        return None
    # all whole tensors of sharded weights would not fit on one device together
    return tensor.cpu() if world.size > 1 else tensor


def _bytes(state: Any) -> int:
    """The size of all tensors in nested dicts, in bytes."""
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(_bytes(value) for value in state.values()) if isinstance(state, dict) else 0
