"""Chooses how forwards and backwards are computed where the recipe says ``auto``, by trying.

A mode is whether blocks are compiled, and what the backward recomputes. Each mode is tried with the largest
micro-batch that fits, and the fastest is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.engine.compiling import compile_blocks, use_uncompiled
from posttrain.engine.micro_batch import Trial, items_in_step, largest_micro_batch, one_trial, sizes_tried
from posttrain.errors import TrainingError
from posttrain.policy.activations import SELECTIVE, Checkpointing, checkpoint_blocks, share_kept
from posttrain.policy.out_of_memory import OutOfMemory

if TYPE_CHECKING:
    import torch

    from posttrain.algorithm import Algorithm
    from posttrain.engine.trial import Sample
    from posttrain.optim.settings import Train
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy.policy import Policy

WORTHWHILE = 600
"""Seconds of uncompiled training from which ``compile: auto`` tries to compile: ten times what it takes."""
PATIENCE = 100
"""Seconds after which nothing more is tried. What has begun then may take about twenty more."""
EAGER: tuple[Checkpointing, ...] = ("off", "selective", "full")
COMPILED: tuple[Checkpointing, ...] = ("off", SELECTIVE, 0.2, "full")


@dataclass(frozen=True)
class Mode:
    """How forwards and backwards are computed."""

    compiled: bool = False
    checkpointing: Checkpointing = "off"

    def __str__(self) -> str:
        return (
            f"{'compiled' if self.compiled else 'not compiled'}, gradient_checkpointing {self.checkpointing}"
        )


@dataclass(frozen=True)
class Found:
    """A mode that was tried, with its micro-batch."""

    mode: Mode
    micro_batch: int
    trials: list[Trial]

    @property
    def items_per_second(self) -> float:
        return self.trials[-1].items_per_second


def settled(settings: Train, device: torch.device) -> Mode | None:
    """The mode that the recipe or the device decides; None if it must be found by trying, on CUDA."""
    compiled, checkpointing = settings.compile, settings.gradient_checkpointing
    if device.type == "cuda" and "auto" in (compiled, checkpointing):
        return None
    return Mode(compiled is True, "off" if checkpointing == "auto" else checkpointing)


def enter(mode: Mode, policy: Policy, strategy: Strategy, sample: Sample | None) -> str | None:
    """Let the policy's blocks compute in ``mode``.

    Compiling needs a ``sample``. If it fails, the blocks stay uncompiled, and the reason is returned. Raises
    TrainingError as :func:`compile_blocks` does.
    """
    transformer, checkpointing = policy.model.transformer, mode.checkpointing
    if policy.compiled:
        use_uncompiled(policy)
    if not mode.compiled:
        checkpoint_blocks(transformer, checkpointing)
        return None
    assert sample is not None, "a mode is compiled on a sample"
    checkpoint_blocks(transformer, "full" if checkpointing == "full" else "off")
    if (reason := compile_blocks(policy, strategy, sample, share_kept(checkpointing))) is not None:
        checkpoint_blocks(transformer, checkpointing)
    return reason


def fastest(
    algorithm: Algorithm,
    settings: Train,
    policy: Policy,
    strategy: Strategy,
    sample: Sample,
    steps: int,
    clock: Callable[[], float] = time.monotonic,
) -> list[Found]:
    """Try the modes that the settings allow, on rows of the ``sample``; return those that work, the fastest
    first, and be in its mode.

    ``steps`` are still to be taken. Of the modes without compilation, the first in which one item fits is
    tried. Those with it follow if the rest of the stage would take WORTHWHILE seconds, one after the other
    while no more than PATIENCE seconds have passed. All processes decide alike. Raises TrainingError if one
    item fits in no mode.
    """
    world, began, found = strategy.world, clock(), list[Found]()

    def expired() -> bool:
        return world.broadcast(clock() - began) > PATIENCE

    search = _Search(algorithm, settings, policy, strategy, sample, expired)
    may_compile = settings.compile is not False and strategy.compiles
    if settings.compile is not True:
        found += search.first(False, EAGER)
        seconds = items_in_step(algorithm, settings, strategy) * steps / found[0].items_per_second
        may_compile = may_compile and world.broadcast(seconds) >= WORTHWHILE
    for checkpointing in search.allowed(COMPILED) if may_compile else ():
        if found and expired():
            break
        if (one := search.tried(Mode(True, checkpointing), found)) is not None:
            found.append(one)
    found = found or search.first(False, EAGER)
    found.sort(key=lambda one: -one.items_per_second)
    if search.mode != found[0].mode:
        enter(found[0].mode, policy, strategy, sample)
    return found


def in_words(found: list[Found], device: torch.device) -> str:
    """What was chosen, and what else was tried, in a line."""
    best = found[0]
    line = f"chosen by trying: {best.mode}, micro_batch {best.micro_batch} "
    line += f"({sizes_tried(best.trials, device)})"
    others = [f"{one.mode}: {one.items_per_second:.3g}/s with {one.micro_batch}" for one in found[1:]]
    return line + (f"; slower were {'; '.join(others)}" if others else "")


@dataclass
class _Search:
    algorithm: Algorithm
    settings: Train
    policy: Policy
    strategy: Strategy
    sample: Sample
    expired: Callable[[], bool]
    mode: Mode | None = None
    """The mode that the blocks are in."""
    failure: TrainingError | None = None
    """Why the last mode that failed did."""

    def allowed(self, modes: tuple[Checkpointing, ...]) -> tuple[Checkpointing, ...]:
        """What the settings allow of gradient checkpointing: all ``modes``, or what they say."""
        given = self.settings.gradient_checkpointing
        return modes if given == "auto" else (given,)

    def first(self, compiled: bool, modes: tuple[Checkpointing, ...]) -> list[Found]:
        """The first of the modes that works. Raises TrainingError if none does."""
        for checkpointing in self.allowed(modes):
            if (one := self.tried(Mode(compiled, checkpointing), [])) is not None:
                return [one]
        assert self.failure is not None, "a mode that does not work says why"
        raise self.failure

    def tried(self, mode: Mode, before: list[Found]) -> Found | None:
        """The mode with its micro-batch, looked for from the largest of those found ``before`` on; None if
        no item fits, or if the blocks cannot be compiled."""
        policy, strategy, given = self.policy, self.strategy, self.settings.micro_batch
        self.mode = mode
        try:
            if (reason := enter(mode, policy, strategy, self.sample)) is not None:
                raise TrainingError(f"compile: {reason}")
            if given == "auto":
                first = max((one.micro_batch for one in before), default=1)
                return Found(
                    mode,
                    *largest_micro_batch(
                        self.algorithm, self.settings, policy, strategy, self.sample, first, self.expired
                    ),
                )
            return Found(mode, given, [one_trial(self.algorithm, given, policy, strategy, self.sample)])
        except OutOfMemory:
            raise
        except TrainingError as error:
            self.failure = error
            return None
