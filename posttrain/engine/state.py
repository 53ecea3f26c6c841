"""The training state of a stage: what one process holds of it, and what a checkpoint has of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from posttrain.engine.manifest import Damage
from posttrain.parallel.strategy import Strategy
from posttrain.policy.piece import Piece, Stored
from posttrain.policy.policy import Policy

TRAINED, ROLES, OPTIMIZER = "trained", "roles", "optimizer"
"""The first words of paths: ``trained/WEIGHT``, ``roles/ROLE/WEIGHT``, ``optimizer/WEIGHT/KEY``."""


@dataclass(frozen=True)
class State:
    """What one process holds of the training state after some steps."""

    step: int
    forward_equivalents: int
    """The sum over all processes."""
    extra: dict[str, Any]
    """What JSON can hold."""
    tensors: dict[str, Piece]
    """Path -> what this process writes of the tensor. The paths are the same in every process."""

    @property
    def size(self) -> int:
        """Of all numbers here, in bytes."""
        return sum(piece.values.nbytes for piece in self.tensors.values())

    @property
    def held(self) -> dict[str, Piece]:
        """The tensors of which this process has numbers, and those that have none at all."""
        return {path: p for path, p in self.tensors.items() if p.values.numel() or not p.shape.numel()}

    def copied(self) -> State:
        """The same with a copy of each tensor in the CPU's memory, which training does not change."""
        return replace(self, tensors={path: piece.copied() for path, piece in self.tensors.items()})


@dataclass
class StoredState:
    """A training state in files."""

    step: int
    forward_equivalents: int
    extra: dict[str, Any]
    trained: dict[str, Stored] = field(default_factory=dict)
    """By the weight's name."""
    roles: dict[str, dict[str, Stored]] = field(default_factory=dict)
    """By role, and by the weight's name."""
    optimizer: dict[str, dict[str, Stored]] = field(default_factory=dict)
    """By the weight's name, and by the optimizer's own key."""

    def add(self, path: str, stored: Stored) -> None:
        """Put a tensor where its path says. Raises Damage for the path of no part of a state."""
        match path.split("/"):
            case [kind, name] if kind == TRAINED:
                self.trained[name] = stored
            case [kind, role, name] if kind == ROLES:
                self.roles.setdefault(role, {})[name] = stored
            case [kind, name, key] if kind == OPTIMIZER:
                self.optimizer.setdefault(name, {})[key] = stored
            case _:
                raise Damage(f"{path} is no part of a training state")


def state_of(step: int, policy: Policy, strategy: Strategy, extra: dict[str, Any]) -> State:
    """The training state after ``step`` steps. Every process must call it at the same time.

    Nothing is copied: training changes the tensors. What every process holds is the main one's to write.
    There is no state of a random generator, because every draw is a function of the seed and of what
    ``extra`` counts.
    """
    world = strategy.world
    moving = [role for role in policy.roles if role not in policy.static]
    tensors = {
        **{f"{TRAINED}/{name}": piece for name, piece in policy.pieces(None).items()},
        **{f"{ROLES}/{role}/{name}": p for role in moving for name, p in policy.pieces(role).items()},
        **{
            f"{OPTIMIZER}/{name}/{key}": piece
            for name in policy.trained
            for key, piece in strategy.moments(name).items()
        },
    }
    own = {path: p.none() if p.everywhere and not world.is_main else p for path, p in tensors.items()}
    return State(step, sum(world.gather_objects(policy.forward_equivalents)), extra, own)


def check_fit(state: StoredState, policy: Policy, strategy: Strategy) -> None:
    """Raise Damage unless ``state`` has all that ``policy`` and ``strategy`` train with.

    ``extra["updates"]``, if there is such a number, says how many steps the optimizer took.
    """
    wanted = {name: (strategy.layout.shape(p), p.dtype) for name, p in policy.trained.items()}
    if _kinds(state.trained) != wanted:
        raise Damage(
            f"it holds other weights than this stage trains ({len(state.trained)} tensors, not "
            f"{len(wanted)}, or other shapes: another LoRA rank?)"
        )
    moving = {role for role in policy.roles if role not in policy.static}
    if state.roles.keys() != moving:
        raise Damage(f"it holds the roles {sorted(state.roles)}; this stage has {sorted(moving)}")
    for role, tensors in state.roles.items():
        if _kinds(tensors) != wanted:
            raise Damage(f"the role {role!r} holds other weights than this stage trains")
    if not state.optimizer.keys() <= wanted.keys():
        raise Damage("the optimizer's state is of other weights than this stage trains")
    if state.extra.get("updates") and not state.optimizer:
        raise Damage(f"the optimizer's state is empty after {state.extra['updates']} steps")


def restore(state: StoredState, policy: Policy, strategy: Strategy) -> None:
    """Put a state that fits into ``policy`` and ``strategy``. No other process takes part.

    A process whose weights are in parts reads its own parts and nothing else.
    """
    for role, weights in {None: state.trained, **state.roles}.items():
        policy.load(role, weights)
    strategy.mark_loaded()
    strategy.load_moments(state.optimizer)
    # records show the sum over all processes, so only one process may have the stored sum
    policy.forward_equivalents = state.forward_equivalents if strategy.world.is_main else 0


def _kinds(tensors: Mapping[str, Stored]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (stored.shape, stored.dtype) for name, stored in tensors.items()}
