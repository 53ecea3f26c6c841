"""Finds by trying how many items the device takes in one forward-backward."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from posttrain.algorithm import Algorithm
from posttrain.engine import trial
from posttrain.engine.rehearsal import rehearse
from posttrain.policy.out_of_memory import OutOfMemory, is_out_of_memory, too_little
from posttrain.support.device import available_memory, free_memory, reset_peak_memory
from posttrain.support.wording import short

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy.policy import Policy

GAIN = 1.05
"""How much faster a row must become for twice as many to be worth their memory."""
FILLED = 0.9
"""Of the free memory: fragments need the rest, and what a step holds beside activations."""


@dataclass(frozen=True)
class Trial:
    """A forward and backward of some items."""

    items: int
    items_per_second: float
    bytes: int
    """At its peak, on top of what was held before."""


def found_by_trying(
    algorithm: Algorithm, settings: Train, policy: Policy, strategy: Strategy, sample: trial.Sample
) -> tuple[int, list[Trial]]:
    """The largest power of two of items that fits and is faster than half of it; and what was tried.

    Tried is a forward and backward of the transformer on rows of the ``sample``, with a gradient of 0:
    nothing is trained. All processes try alike. Raises TrainingError where one item alone does not fit, and
    OutOfMemory where more did not, and the strategy cannot go on from there.
    """
    world, device = strategy.world, policy.model.device
    calls = rehearse(algorithm)
    rows = calls.rows_with
    per_step = int(settings.batch_size * calls.items) // settings.steps_per_batch
    most, trials = max(per_step // world.size, 1), []
    while not trials or 2 * trials[-1].items <= most:
        items = 2 * trials[-1].items if trials else 1
        if trials and world.max(not _has_room(strategy, policy, trials)):
            break
        try:
            seconds, held = trial.timed(policy, strategy, sample, items * rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not trials:
                raise too_little("with one item at a time", error) from error
            # parts of weights that other processes wait for are not to be had after this
            if world.size > 1 or not strategy.repeatable:
                raise OutOfMemory(error, items, trials[-1].items) from error
            break
        seconds, held = (max(values) for values in zip(*world.gather_objects((seconds, held)), strict=True))
        made = Trial(items, items / seconds, held)
        if trials and made.items_per_second < GAIN * trials[-1].items_per_second:
            break
        trials.append(made)
    gc.collect()
    free_memory(device)
    reset_peak_memory(device)  # what was tried and not taken is not what the stage needs
    return trials[-1].items, trials


def described(trials: list[Trial], device: torch.device) -> str:
    """What was found, in a line."""
    last = trials[-1]
    tried = ", ".join(f"{t.items}: {t.items_per_second:.3g}/s" for t in trials)
    # elsewhere what the allocator kept from before hides what was taken
    held = f"; {short(last.bytes, 'B')} more memory than at rest" if device.type == "cuda" else ""
    return f"micro_batch auto is {last.items} ({tried}{held})"


def _has_room(strategy: Strategy, policy: Policy, trials: list[Trial]) -> bool:
    """Whether twice as many items as in the last of ``trials`` are likely to fit."""
    if (free := available_memory(policy.model.device)) is None:
        return True
    last, before = trials[-1].bytes, trials[-2].bytes if len(trials) > 1 else 0
    expected = last + 2 * max(last - before, 0)
    if not strategy.optimizer.state:  # both moments are still to come
        expected += sum(8 * strategy.layout.local(p).numel() for p in policy.trained.values())
    return expected <= FILLED * free
