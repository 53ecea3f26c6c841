"""Chooses how forwards and backwards are computed where the recipe says ``auto``, by trying.

A mode is whether blocks are compiled, and what the backward recomputes. Each mode that is tried gets the
largest micro-batch that fits, and the fastest is taken. Compiling for one size took 15 to 20 seconds on a
machine with an H100, so few are tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.engine.compiling import compile_blocks, use_uncompiled
from posttrain.engine.micro_batch import Trial, items_in_step, largest_micro_batch, one_trial, sizes_tried
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import TrainingError
from posttrain.policy.activations import SELECTIVE, Checkpointing, checkpoint_blocks, share_kept

if TYPE_CHECKING:
    import torch

    from posttrain.algorithm import Algorithm
    from posttrain.engine.trial import Sample
    from posttrain.optim.settings import Train
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy.policy import Policy

WORTHWHILE = 600
"""Seconds of uncompiled training from which ``compile: auto`` tries to compile: ten times what it takes."""
PATIENCE = 120
"""Seconds that trying may take."""
COMPILING = 20
"""Seconds that a trial is expected to take before one took longer."""
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
    crowded: bool
    """Whether memory is what kept the micro-batch from being larger."""

    @property
    def items_per_second(self) -> float:
        return self.trials[-1].items_per_second


def settled(settings: Train, device: torch.device) -> Mode | None:
    """The mode that the recipe or the device decides; None if it must be found by trying, on CUDA.

    A micro-batch for compiled blocks is found with the mode too: uncompiled sizes are tried faster.
    """
    compiled, checkpointing = settings.compile, settings.gradient_checkpointing
    open_questions = (compiled, checkpointing, settings.micro_batch if compiled is True else None)
    if device.type == "cuda" and "auto" in open_questions:
        return None
    return Mode(compiled is True, "off" if checkpointing == "auto" else checkpointing)


def enter(mode: Mode, policy: Policy, strategy: Strategy, sample: Sample | None, rows: int = 1) -> str | None:
    """Let the policy's blocks compute in ``mode``.

    Compiling needs a ``sample``, of which ``rows`` are computed at once. If it fails, the blocks stay
    uncompiled, and the reason is returned. Raises TrainingError as :func:`compile_blocks` does.
    """
    transformer, checkpointing = policy.model.transformer, mode.checkpointing
    if policy.compiled:
        use_uncompiled(policy)
    if not mode.compiled:
        checkpoint_blocks(transformer, checkpointing)
        return None
    assert sample is not None, "a mode is compiled on a sample"
    checkpoint_blocks(transformer, "full" if checkpointing == "full" else "off")
    if (reason := compile_blocks(policy, strategy, sample, share_kept(checkpointing), rows)) is not None:
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
    tell: Callable[[str], None] = lambda reason: None,
) -> list[Found]:
    """Try the modes that the settings allow, on rows of the ``sample``; return those that work, the fastest
    first, and be in its mode. ``tell`` gets the reason where blocks could not be compiled.

    ``steps`` are still to be taken. Of the modes without compilation, the first in which one item fits is
    tried. Those with it follow if the rest of the stage would take WORTHWHILE seconds. Recomputing more saves
    memory and takes time, so each compiled mode begins with twice the micro-batch of the one before, and the
    search ends with a mode that is slower than the one before, or that memory did not limit. It also ends
    where one more trial would probably exceed PATIENCE seconds. All processes decide alike. Raises
    TrainingError if one item fits in no mode, or if the strategy cannot continue after what did not fit.
    """
    search = _Search(algorithm, settings, policy, strategy, sample, clock)
    found = search.first_that_works(EAGER)
    may_compile = settings.compile is not False and strategy.compiles
    if settings.compile == "auto" and found:
        seconds = items_in_step(algorithm, settings, strategy) * steps / found[0].items_per_second
        may_compile = may_compile and strategy.world.broadcast(seconds) >= WORTHWHILE
    if may_compile and (compiled := search.compiled(found)):
        found = compiled if settings.compile is True else [*found, *compiled]
    elif may_compile and (settings.compile is True or not search.compiles):
        reason = search.failure or f"no time is left of the {PATIENCE} s in which modes are tried"
        tell(str(reason).removeprefix("compile: "))
    if not found:
        assert search.failure is not None, "a mode that does not work says why"
        raise search.failure
    found.sort(key=lambda one: -one.items_per_second)
    if search.mode != found[0].mode:
        search.enter(found[0].mode, found[0].micro_batch)
    return found


def in_words(found: list[Found], device: torch.device) -> str:
    """What was chosen, and what else was tried, in a line."""
    best = found[0]
    line = f"chosen by trying: {best.mode}, micro_batch {best.micro_batch} "
    line += f"({sizes_tried(best.trials, device)})"
    others = [f"{one.mode}: {one.items_per_second:.3g}/s with {one.micro_batch}" for one in found[1:]]
    return line + (f"; slower were {'; '.join(others)}" if others else "")


class _Search:
    """Tries modes, and knows how long that took."""

    def __init__(
        self,
        algorithm: Algorithm,
        settings: Train,
        policy: Policy,
        strategy: Strategy,
        sample: Sample,
        clock: Callable[[], float],
    ) -> None:
        self.algorithm, self.settings, self.policy = algorithm, settings, policy
        self.strategy, self.sample, self.clock = strategy, sample, clock
        self.mode: Mode | None = None
        """The mode that the blocks are in; None if they could not enter the last one."""
        self.compiles = True
        """False if the last mode could not be compiled."""
        self.failure: TrainingError | None = None
        """Why the last mode that failed did, without the tensors of its forward."""
        self._began = self._last = clock()
        self._longest = float(COMPILING)

    def expired(self) -> bool:
        """Whether one more trial would probably end after PATIENCE seconds. Called after each trial."""
        now = self.clock()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        return self.strategy.world.broadcast(now - self._began + self._longest) > PATIENCE

    def first_that_works(self, modes: tuple[Checkpointing, ...]) -> list[Found]:
        """The first of the modes without compilation in which one item fits; none if none does."""
        for checkpointing in self._allowed(modes):
            if (one := self._tried(Mode(False, checkpointing), 1)) is not None:
                self.failure = None
                return [one]
        return []

    def compiled(self, before: list[Found]) -> list[Found]:
        """The compiled modes that work, in the order tried, from the micro-batch of those ``before`` on."""
        found, items = list[Found](), before[0].micro_batch if before else 1
        for checkpointing in self._allowed(COMPILED):
            if self.expired() and (before or found):
                break
            if (one := self._tried(Mode(True, checkpointing), items)) is None:
                if not self.compiles:
                    break  # what cannot be compiled once cannot be compiled otherwise
                continue
            found.append(one)
            slower = len(found) > 1 and one.items_per_second < found[-2].items_per_second
            if slower or not one.crowded:
                break
            items = 2 * one.micro_batch
        return found

    def enter(self, mode: Mode, items: int) -> str | None:
        """See :func:`enter`; compiled for a micro-batch of so many ``items``."""
        rows = items * rehearse(self.algorithm, self.policy.model.guidance_rule).rows_with
        self.mode = None  # what raises an error here leaves the blocks neither in this mode nor in the last
        reason = enter(mode, self.policy, self.strategy, self.sample, rows)
        self.compiles = reason is None
        self.mode = mode if self.compiles else None
        return reason

    def _allowed(self, modes: tuple[Checkpointing, ...]) -> tuple[Checkpointing, ...]:
        """What the settings allow of gradient checkpointing: all ``modes``, or what they say."""
        given = self.settings.gradient_checkpointing
        return modes if given == "auto" else (given,)

    def _tried(self, mode: Mode, first: int) -> Found | None:
        """The mode with its micro-batch, looked for from ``first`` on; None if no item fits, or if the blocks
        cannot be compiled."""
        given = self.settings.micro_batch
        try:
            if (reason := self.enter(mode, first if given == "auto" else given)) is not None:
                self.failure = TrainingError(f"compile: {reason}")
                return None
            if given == "auto":
                size = largest_micro_batch(
                    self.algorithm,
                    self.settings,
                    self.policy,
                    self.strategy,
                    self.sample,
                    first,
                    self.expired,
                )
                return Found(mode, size.items, size.trials, size.crowded)
            trial = one_trial(self.algorithm, given, self.policy, self.strategy, self.sample)
            return Found(mode, given, [trial], crowded=False)
        except TrainingError as error:
            if not self.strategy.tries_alone:  # else all processes fail alike
                raise
            self.failure = TrainingError(str(error))
            return None
