"""How many items does a stage take at a time? What the recipe says, or what trying once has shown.

What was found, and what had to be lowered since, is remembered in the stage's folder, so that a run that goes
on rounds as it did.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.condition import Conditions
from posttrain.device import available_memory, peak_memory, reset_peak_memory, synchronize
from posttrain.memory import is_out_of_memory
from posttrain.planning.rehearsal import rehearse
from posttrain.results import short
from posttrain.sampling import encode

if TYPE_CHECKING:
    from posttrain.feeds import Feed
    from posttrain.model import FlowModel
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy import Policy
    from posttrain.recipe import Recipe, Stage

FILE = "micro_batch.json"
GAIN = 1.05
"""How much faster a row must become for twice as many to be worth their memory."""
FILLED = 0.9
"""Of the free memory: fragments need the rest, and what a step holds beside activations."""


Sample = tuple[torch.Tensor, Conditions]
"""Latents (c, h, w), and encoded prompts of which the first row is the empty one's."""


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
    """Keep ``number`` for when the run goes on in as many processes on such a device."""
    about = {**_circumstances(recipe, size), "micro_batch": number}
    if trials:
        about["trials"] = [asdict(trial) for trial in trials]
    part = folder / f".{FILE}.{time.monotonic_ns()}"
    part.write_text(json.dumps(about, indent=2))
    part.rename(folder / FILE)


def _remembered(recipe: Recipe, folder: Path, size: int) -> int | None:
    try:
        found = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    now = _circumstances(recipe, size)
    return found["micro_batch"] if {name: found.get(name) for name in now} == now else None


def _circumstances(recipe: Recipe, size: int) -> dict[str, Any]:
    from posttrain.device import resolve

    device = resolve(recipe.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "parallel": recipe.parallel.model_dump(mode="json"), "processes": size}


def found_by_trying(
    stage: Stage, policy: Policy, strategy: Strategy, sample: Sample
) -> tuple[int, list[Trial]]:
    """The largest power of two of items that fits and is faster than half of it; and what was tried.

    Tried is a forward and backward of the transformer on rows of the ``sample``, with a gradient of 0:
    nothing is trained. All processes try alike. Raises RuntimeError where one item alone does not fit.
    """
    algorithm, world = stage.algorithm, strategy.world
    rows = rehearse(algorithm).rows_with
    per_step = stage.train.batch_size * algorithm.items_per_sample() // stage.train.steps_per_batch
    most, trials = max(per_step // world.size, 1), []
    while not trials or 2 * trials[-1].items <= most:
        items = 2 * trials[-1].items if trials else 1
        if trials and world.most(not _has_room(strategy, policy, trials)):
            break
        try:
            seconds, held = _tried(policy, strategy, sample, items * rows)
        except (RuntimeError, MemoryError) as error:
            # parts of weights that other processes wait for are not to be had after this
            if not trials or world.size > 1 or not is_out_of_memory(error):
                raise
            break
        seconds, held = (max(values) for values in zip(*world.objects((seconds, held)), strict=True))
        trial = Trial(items, items / seconds, held)
        if trials and trial.items_per_second < GAIN * trials[-1].items_per_second:
            break
        trials.append(trial)
    return trials[-1].items, trials


def described(trials: list[Trial], device: torch.device) -> str:
    """What was found, in a line."""
    last = trials[-1]
    tried = ", ".join(f"{t.items}: {t.items_per_second:.3g}/s" for t in trials)
    # elsewhere what the allocator kept from before hides what was taken
    held = f"; {short(last.bytes, 'B')} more memory than at rest" if device.type == "cuda" else ""
    return f"micro_batch auto is {last.items} ({tried}{held})"


def blank(model: FlowModel, feed: Feed) -> Sample:
    """Latents (c, h, w) of the stage's largest image, and the encoded empty prompt."""
    conditions, _ = encode(model, [])
    return torch.zeros(model.latent_shape(*feed.largest), device=model.device), conditions


def try_out(policy: Policy, strategy: Strategy, sample: Sample, rows: int) -> None:
    """A forward and backward on ``rows`` of the ``sample``, of which nothing stays."""
    latents, conditions = sample
    device, spent = latents.device, policy.forward_equivalents
    empty = conditions.rows(torch.zeros(rows, dtype=torch.int64, device=device))
    sigma = torch.full((rows,), 0.5, device=device)
    strategy.begin(last=False)
    strategy.backward(policy.velocity(latents.repeat(rows, 1, 1, 1), sigma, empty).sum() * 0.0)
    strategy.forget()
    policy.forward_equivalents = spent


def _tried(policy: Policy, strategy: Strategy, sample: Sample, rows: int) -> tuple[float, int]:
    """Seconds of :func:`try_out`, and the bytes that it took."""
    device, took = policy.model.device, []
    reset_peak_memory(device)
    before = peak_memory(device)
    for _ in range(3):  # the first also starts libraries, and compiles
        synchronize(device)
        start = time.perf_counter()
        try_out(policy, strategy, sample, rows)
        synchronize(device)
        took.append(time.perf_counter() - start)
    return min(took), max(peak_memory(device) - before, 0)


def _has_room(strategy: Strategy, policy: Policy, trials: list[Trial]) -> bool:
    """Whether twice as many items as in the last of ``trials`` are likely to fit."""
    if (free := available_memory(policy.model.device)) is None:
        return True
    last, before = trials[-1].bytes, trials[-2].bytes if len(trials) > 1 else 0
    expected = last + 2 * max(last - before, 0)
    if not strategy.optimizer.state:  # both moments are still to come
        expected += sum(8 * strategy.layout.held(p).numel() for p in policy.trained.values())
    return expected <= FILLED * free
