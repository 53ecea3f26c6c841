"""Finds the micro-batch of ``micro_batch: auto`` by timing forward-backwards of growing size."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from posttrain.algorithm import Algorithm
from posttrain.engine import trial
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import TrainingError
from posttrain.policy.out_of_memory import OutOfMemory, is_out_of_memory, too_little
from posttrain.support.device import available_memory, free_memory, reset_peak_memory
from posttrain.support.wording import short

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy.policy import Policy

GAIN = 1.05
"""A micro-batch of twice the size must raise the throughput by this factor, or it is not worth its memory."""
FILLED = 0.9
"""Fraction of the free memory that a trial may be expected to take. The rest is for fragmentation and for
what a step holds beside activations."""


@dataclass(frozen=True)
class Trial:
    """One forward and backward that was tried."""

    items: int
    items_per_second: float
    bytes: int
    """Peak memory, on top of what was held before."""


@dataclass(frozen=True)
class Size:
    """A micro-batch that was found by trying."""

    items: int
    trials: list[Trial]
    crowded: bool
    """Whether memory is what kept it from being larger."""


def largest_micro_batch(
    algorithm: Algorithm,
    settings: Train,
    policy: Policy,
    strategy: Strategy,
    sample: trial.Sample,
    first: int = 1,
    expired: Callable[[], bool] = lambda: False,
) -> Size:
    """Find the largest micro-batch that fits and still raises throughput.

    The sizes are ``first``, its double and so on; a ``first`` that does not fit is halved until it does.
    No further size is tried once ``expired``, which all processes ask and answer alike.
    Each trial is a forward and backward on rows of the ``sample``, and trains nothing. All processes try the
    same sizes. Raises TrainingError if one item does not fit, and OutOfMemory if more did not and the
    strategy cannot continue after that.
    """
    calls = rehearse(algorithm, policy.model.guidance_rule)
    limit = items_in_step(algorithm, settings, strategy)
    items, trials, crowded = min(first, limit), list[Trial](), False
    while not trials or (items <= limit and not expired()):
        if trials and not _all_have_room(strategy, policy, trials):
            crowded = True
            break
        result = _tried(items, calls.rows_with, policy, strategy, sample)
        if result is None:
            crowded = True
            if trials:
                break
            items //= 2
            limit = items
            continue
        if trials and result.items_per_second < GAIN * trials[-1].items_per_second:
            break
        trials.append(result)
        items *= 2
    gc.collect()
    free_memory(policy.model.device)
    reset_peak_memory(policy.model.device)  # the stage's peak must not include that of the trials
    return Size(trials[-1].items, trials, crowded)


def items_in_step(algorithm: Algorithm, settings: Train, strategy: Strategy) -> int:
    """The items of one optimizer step on one process, at least 1."""
    items = int(settings.batch_size * rehearse(algorithm).items) // settings.steps_per_batch
    return max(items // strategy.world.size, 1)


def one_trial(
    algorithm: Algorithm, items: int, policy: Policy, strategy: Strategy, sample: trial.Sample
) -> Trial:
    """The trial of a micro-batch of so many ``items``. Raises TrainingError if they do not fit, and
    OutOfMemory if the strategy cannot continue after that."""
    calls = rehearse(algorithm, policy.model.guidance_rule)
    result = _tried(items, calls.rows_with, policy, strategy, sample)
    if result is None:
        raise TrainingError(f"out of memory with {items} items at a time")
    return result


def trials_in_words(trials: list[Trial], device: torch.device) -> str:
    """The chosen micro-batch and the trials, in a line."""
    return f"micro_batch auto is {trials[-1].items} ({sizes_tried(trials, device)})"


def sizes_tried(trials: list[Trial], device: torch.device) -> str:
    """The sizes that were tried, each with its throughput in items, and the memory of the last."""
    tried = ", ".join(f"{t.items}: {t.items_per_second:.3g}/s" for t in trials)
    # on other devices the allocator reuses memory of earlier work, so the number would be too small
    memory = f"; {short(trials[-1].bytes, 'B')} more memory than at rest" if device.type == "cuda" else ""
    return f"{tried}{memory}"


def _tried(items: int, rows: int, policy: Policy, strategy: Strategy, sample: trial.Sample) -> Trial | None:
    """A trial of ``items`` items of ``rows`` rows each, by the slowest and fullest process; None if they do
    not fit."""
    measured: tuple[float, int] | str
    one = "with one item at a time"
    try:
        measured = trial.timed(policy, strategy, sample, items * rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not strategy.tries_alone:
            # other processes are still waiting for this one, or weights are left gathered
            lack = too_little(one, error) if items == 1 else OutOfMemory(error, items, items // 2)
            raise lack from error
        measured = str(error)  # the error itself would keep the failed forward's tensors alive
    results = strategy.world.gather_objects(measured)
    if lacking := [result for result in results if isinstance(result, str)]:
        if items == 1:
            raise too_little(one, MemoryError(lacking[0]))
        return None
    seconds, memory = (max(values) for values in zip(*results, strict=True))
    return Trial(items, items / seconds, memory)


def _all_have_room(strategy: Strategy, policy: Policy, trials: list[Trial]) -> bool:
    """Whether twice as many items as in the last trial probably fit on every process."""
    return not strategy.world.max(not _has_room(strategy, policy, trials))


def _has_room(strategy: Strategy, policy: Policy, trials: list[Trial]) -> bool:
    if (free := available_memory(policy.model.device)) is None:
        return True
    last = trials[-1].bytes
    growth = 2 * max(last - trials[-2].bytes, 0) if len(trials) > 1 else last
    expected = last + growth
    if not strategy.optimizer.state:  # the first step will add both moments, in float32
        expected += sum(8 * strategy.layout.local(p).numel() for p in policy.trained.values())
    return expected <= FILLED * free
