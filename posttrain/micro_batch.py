"""How many items does a stage take at a time? What the recipe says, or what trying once has shown.

What was found, and what had to be lowered since, is remembered in the stage's folder, so that a run that goes
on begins with it.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain import trial
from posttrain.device import available_memory, free_memory, reset_peak_memory, resolve
from posttrain.files import write
from posttrain.memory import OutOfMemory, is_out_of_memory, too_little
from posttrain.rehearsal import rehearse
from posttrain.wording import short

if TYPE_CHECKING:
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy import Policy
    from posttrain.recipe import Recipe, Stage

FILE = "micro_batch.json"
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


def settled(recipe: Recipe, stage: Stage, folder: Path, size: int) -> int | None:
    """The number to begin with; None where it is to be found first."""
    given, found = stage.train.micro_batch, _remembered(recipe, folder, size)
    if found is not None:
        return found if given == "auto" else min(given, found)
    return None if given == "auto" else given


def remember(recipe: Recipe, folder: Path, size: int, number: int, trials: list[Trial] | None = None) -> None:
    """Keep ``number`` for when the run goes on in as many processes, under the same strategy, on such a
    device."""
    about = {**_circumstances(recipe, size), "micro_batch": number}
    if trials:
        about["trials"] = [asdict(made) for made in trials]
    write(folder / FILE, json.dumps(about, indent=2))


def _remembered(recipe: Recipe, folder: Path, size: int) -> int | None:
    try:
        found = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    now = _circumstances(recipe, size)
    if not isinstance(found, dict) or {name: found.get(name) for name in now} != now:
        return None
    number = found.get("micro_batch")
    return number if type(number) is int and number >= 1 else None


def _circumstances(recipe: Recipe, size: int) -> dict[str, Any]:
    device = resolve(recipe.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "parallel": recipe.parallel.model_dump(mode="json"), "processes": size}


def found_by_trying(
    stage: Stage, policy: Policy, strategy: Strategy, sample: trial.Sample
) -> tuple[int, list[Trial]]:
    """The largest power of two of items that fits and is faster than half of it; and what was tried.

    Tried is a forward and backward of the transformer on rows of the ``sample``, with a gradient of 0:
    nothing is trained. All processes try alike. Raises TrainingError where one item alone does not fit, and
    OutOfMemory where more did not, and the strategy cannot go on from there.
    """
    algorithm, world, device = stage.algorithm, strategy.world, policy.model.device
    calls = rehearse(algorithm)
    rows = calls.rows_with
    per_step = int(stage.train.batch_size * calls.items) // stage.train.steps_per_batch
    most, trials = max(per_step // world.size, 1), []
    while not trials or 2 * trials[-1].items <= most:
        items = 2 * trials[-1].items if trials else 1
        if trials and world.most(not _has_room(strategy, policy, trials)):
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
        seconds, held = (max(values) for values in zip(*world.objects((seconds, held)), strict=True))
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
        expected += sum(8 * strategy.layout.held(p).numel() for p in policy.trained.values())
    return expected <= FILLED * free
