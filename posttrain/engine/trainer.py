"""The training loop: one function, the same for every algorithm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Items, Tools
from posttrain.distributed.world import World
from posttrain.errors import TrainingError
from posttrain.parallel.strategy import Strategy
from posttrain.policy.out_of_memory import fitted, not_repeated
from posttrain.policy.policy import Policy

if TYPE_CHECKING:
    from posttrain.optim.settings import Train

EMA = "ema"
"""The role of the moving average that is evaluated and exported."""
REFERENCE = "reference"
"""The role that never moves: what an online algorithm is held to."""


class Watch(Protocol):
    """What a stage does around the steps: evaluate, save, record."""

    def before_batch(self, step: int) -> bool:
        """Called with the number of finished steps, before the next batch is drawn. False ends the stage."""
        ...

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        """Called after optimizer step ``step`` (from 1) with its metrics, still on the device."""


@dataclass
class OnPolicy:
    """The algorithm's check that the weights which collected items give them the same again."""

    rows: int
    """How many were collected at a time."""
    done: bool = False


def train(
    algorithm: Algorithm,
    policy: Policy,
    strategy: Strategy,
    batches: Iterable[tuple[Batch, Tools]],
    settings: Train,
    watch: Watch,
    start: int = 0,
) -> None:
    """Take the optimizer steps from ``start`` to ``settings.steps``, some of them on each batch.

    NOTE: the order matters to an exact resume: what ``before_batch`` records is the state before a
    batch is drawn, and counters alone say what will be. Raises TrainingError where the batches
    run out, a step is not finite, or memory does not suffice for one item.
    """
    source, step, checked = iter(batches), start, start > 0

    def undone() -> bool:
        strategy.zero_grad()
        # other processes would wait for what this one has sent already
        return strategy.world.size == 1 and strategy.repeatable

    while step < settings.steps and watch.before_batch(step):
        if (drawn := next(source, None)) is None:
            raise TrainingError(f"the data ended after {step} of {settings.steps} steps")
        batch, tools = drawn
        with torch.no_grad(), policy.casts_kept():
            items = fitted(functools.partial(algorithm.collect, batch, tools), policy, undone)
        check = None if checked else OnPolicy(min(policy.micro_batch, len(batch)))
        items = replace(items, weight=torch.where(items.sample_index < 0, 0, items.weight))  # fillers
        parts = list(items.parts(settings.steps_per_batch))
        for i in range(len(parts)):
            for group in strategy.optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            step += 1
            work = functools.partial(update, algorithm, policy, parts[i], strategy, settings, step, check)
            metrics = fitted(work, policy, undone)
            checked = checked or (check is not None and check.done)
            if "skipped_steps" not in metrics:
                check = None  # the weights have moved since they collected the items
            if settings.ema is not None:
                policy.move_role(EMA, settings.ema)
            seen = [batch.total * n // settings.steps_per_batch for n in (i, i + 1)]
            watch.after_step(step, seen[1] - seen[0], {**items.metrics, **metrics})
        algorithm.after_batch(policy, step)
        del items, parts  # not to be held while the next ones are made


def update(
    algorithm: Algorithm,
    policy: Policy,
    items: Items,
    strategy: Strategy,
    settings: Train,
    step: int,
    check: OnPolicy | None = None,
) -> dict[str, Tensor]:
    """One optimizer step on the weighted mean of all processes' items, however they are split.

    Each micro-batch, of ``policy.micro_batch`` items, is back-propagated at once, so activation memory does
    not grow with the number of items. Items of weight 0 are left out. ``check``: the weights are still those
    that collected the items, which the algorithm is let check on as many rows as were collected at a time, if
    there are as many: others are computed with other rounding. Returns weighted means
    of the losses and metrics, and the gradient's norm before clipping; only ``skipped_steps`` where there
    is no item to train on, and no step then. Raises TrainingError, with the weights as they were, where the
    gradient is not finite.
    """
    world = strategy.world
    total = world.sum(items.weight.sum())
    if not total:
        return {"skipped_steps": items.weight.new_ones(())}
    first = check.rows if check is not None and check.rows <= policy.micro_batch else policy.micro_batch
    micros = list(_in_step(items, policy.micro_batch, first, world))
    sums: dict[str, Tensor] = {}
    with policy.casts_kept():
        for i, micro in enumerate(micros):
            strategy.begin_micro_batch(last=i == len(micros) - 1)
            losses = algorithm.loss(micro, policy)
            if i == 0 and check is not None and check.rows == len(micro):
                algorithm.check_on_policy(losses)
                check.done = True
            share = micro.weight / total
            strategy.backward((losses.per_item * share).sum())
            for name, value in {"loss": losses.per_item, **losses.metrics}.items():
                sums[name] = sums.get(name, torch.zeros_like(total)) + (value.detach() * share).sum()
    with not_repeated("in the optimizer's step"):
        norm = strategy.step(settings.max_grad_norm)
    if world.size > 1:
        summed = world.sum(torch.stack([value.double() for value in sums.values()]))
        sums = dict(zip(sums, summed, strict=True))
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {step}: loss {sums['loss'].item():.6g}, gradient norm {norm:.6g} is not finite; "
            "the step was not taken. Try a lower learning_rate, a warm-up, or precision fp32"
        )
    return {**sums, "grad_norm": torch.tensor(norm)}


def _in_step(items: Items, size: int, first: int, world: World) -> Iterator[Items]:
    """The items that count, in as many micro-batches of at most ``size``, the first of at most ``first``, on
    every process."""
    counting = items.take(items.weight > 0)
    own = [counting.take(slice(0, first))] if len(counting) else []
    own += counting.take(slice(first, None)).split(size)
    for _ in range(world.max(len(own)) - len(own)):
        blank = items.take(slice(0, 1))
        own.append(replace(blank, weight=torch.zeros_like(blank.weight)))
    return iter(own)


def learning_rate(settings: Train, step: int) -> float:
    """The learning rate of the step after ``step`` finished ones."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    factors: dict[str, Callable[[float], float]] = {
        "constant": lambda p: 1.0,
        "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
        "linear": lambda p: 1 - p,
    }
    return settings.learning_rate * factors[settings.schedule](progress)
