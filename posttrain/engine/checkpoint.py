"""Writes a stage's training state, and restores it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    """Write the complete training state after ``step`` steps, and remove all but the last ``keep`` and the
    one of step ``protected``.

    Every process calls it, and the main one writes. Tensors are whole and go by the weight's name, so that
    the state can be restored under any strategy, on any number of processes.
    """
    target, world = folder / f"step-{step:08d}", strategy.world

    def kept(tensor: Tensor) -> Tensor | None:
        # one after the other comes whole onto the device, and goes where the state has room
        return (tensor.detach().cpu() if world.size > 1 else tensor.detach()) if world.is_main else None

    moving = [name for name in policy.roles if name not in policy.static]
    state = {
        "step": step,
        "trained": {name: kept(tensor) for name, tensor in policy.whole(None)},
        "roles": {role: {name: kept(tensor) for name, tensor in policy.whole(role)} for role in moving},
        "optimizer": {
            name: {key: kept(value) for key, value in strategy.moments(name).items()}
            for name in policy.trained
        },
        "forward_equivalents": sum(world.gather_objects(policy.forward_equivalents)),
        "extra": extra,
    }
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
    """What :func:`save` wrote. Raises PosttrainError where it cannot be read."""
    try:
        return torch.load(checkpoint / STATE, map_location=device, weights_only=True, mmap=True)
    except Exception as error:
        raise PosttrainError(
            f"cannot read the checkpoint {str(checkpoint)!r}: {error}. Remove it to go on from the one before"
        ) from error


def restore(checkpoint: Path, policy: Policy, strategy: Strategy) -> tuple[int, dict[str, Any]]:
    """Load a checkpoint into ``policy`` and ``strategy``; returns its step and what the stage kept.

    Raises PosttrainError where it cannot be read or belongs to other weights.
    """
    # memory-mapped: of a state in parts, a process reads its own
    state = read(checkpoint, torch.device("cpu"))
    own, kept = policy.trained, state["trained"]
    if own.keys() != kept.keys() or any(strategy.layout.shape(own[n]) != kept[n].shape for n in own):
        raise PosttrainError(
            f"the checkpoint {str(checkpoint)!r} holds other weights than this stage trains "
            f"({len(kept)} tensors, not {len(own)}, or other shapes: another LoRA rank?)"
        )
    for name, weights in {None: kept, **state["roles"]}.items():
        policy.load(name, weights)
    strategy.loaded()
    strategy.load_moments({name: moments for name, moments in state["optimizer"].items() if moments})
    # the sum over all processes is what is recorded
    policy.forward_equivalents = state["forward_equivalents"] if strategy.world.is_main else 0
    return state["step"], state["extra"]


def _bytes(state: Any) -> int:
    """Of all tensors in nested dicts."""
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(_bytes(value) for value in state.values()) if isinstance(state, dict) else 0
