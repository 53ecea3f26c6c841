"""How is a stage's training state written so that a kill at any moment loses nothing that was saved?"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import PosttrainError
from posttrain.parallel.strategy import Strategy
from posttrain.policy import Policy

STATE = "state.pt"


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` at the end of the block, whole or not at all.

    Raises PosttrainError where the disk is full or the folder cannot be written; what was there before
    is then untouched.
    """
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _sync(file)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
        _sync(folder.parent)
    except PosttrainError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    except (OSError, RuntimeError) as error:
        shutil.rmtree(part, ignore_errors=True)
        # torch's and safetensors' writers report a full disk as a RuntimeError of their own wording
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if isinstance(error, OSError) or full or "write" in str(error).lower():
            free = shutil.disk_usage(folder.parent if folder.parent.exists() else Path.cwd()).free
            why = "the disk is full" if full else str(error)
            raise PosttrainError(
                f"cannot write {str(folder)!r}: {why} ({free / 1e9:.2f} GB free); "
                "earlier checkpoints are intact"
            ) from error
        raise


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
        return (tensor.detach().cpu() if world.size > 1 else tensor.detach()) if world.main else None

    moving = [name for name in policy.roles if name not in policy.static]
    state = {
        "step": step,
        "trained": {name: kept(tensor) for name, tensor in policy.whole(None)},
        "roles": {role: {name: kept(tensor) for name, tensor in policy.whole(role)} for role in moving},
        "optimizer": {
            name: {key: kept(value) for key, value in strategy.moments(name).items()}
            for name in policy.trained
        },
        "forward_equivalents": sum(world.objects(policy.forward_equivalents)),
        "extra": extra,
    }
    if world.main:
        with published(target) as part:
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
    policy.forward_equivalents = state["forward_equivalents"] if strategy.world.main else 0
    return state["step"], state["extra"]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
