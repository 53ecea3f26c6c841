"""The training loop and the optimizer step, the same for every algorithm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Items, Tools
from posttrain.distributed.world import World
from posttrain.engine.answers import collected, losses_of
from posttrain.engine.suspects import described, finite, suspects
from posttrain.errors import AlgorithmError, StepRefused, TrainingError
from posttrain.optim.schedule import learning_rate, set_learning_rate
from posttrain.parallel.strategy import Strategy
from posttrain.policy.out_of_memory import halve_until_it_fits, not_repeated
from posttrain.policy.policy import Policy
from posttrain.support.heartbeat import beat

if TYPE_CHECKING:
    from posttrain.optim.settings import Train

EMA = "ema"
"""The role of the moving average that is evaluated and exported."""
REFERENCE = "reference"
"""The role that never moves: the other side of an online algorithm's KL term."""


class Hooks(Protocol):
    """What happens around the optimizer steps of a stage: evaluation, checkpoints, records."""

    def before_batch(self, step: int) -> bool:
        """Called with the number of finished steps, before the next batch is drawn. False ends the stage."""
        ...

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        """Called after optimizer step ``step`` (from 1), which trained on ``samples`` samples of all
        processes, with its metrics, still on the device."""

    def refused(self, step: int, error: StepRefused) -> None:
        """Called in place of ``after_step`` if step ``step`` was not taken. May raise, to end the run."""


@dataclass
class OnPolicy:
    """The on-policy check: the weights that collected the items must give the same values again."""

    rows: int
    """Rows in one forward of the rollout."""
    done: bool = False


def train(
    algorithm: Algorithm,
    policy: Policy,
    strategy: Strategy,
    batches: Iterable[tuple[Batch, Tools]],
    settings: Train,
    hooks: Hooks,
    start: int = 0,
) -> None:
    """Take the optimizer steps from ``start`` to ``settings.steps``, ``steps_per_batch`` on each batch.

    An exact resume depends on the order: ``before_batch`` records the state before a batch is drawn, and all
    that follows is a function of the step. A step whose loss, gradient or rewards are not finite is not
    taken: weights, EMA and roles stay as they are, and it keeps its number and its learning rate. Raises
    TrainingError if the batches run out, or if one item does not fit into memory.
    """
    source, step = iter(batches), start
    checked = start > 0
    undo = partial(_undo, strategy)
    while step < settings.steps and hooks.before_batch(step):
        # one process may have halved it while it drew images, and rollouts exchange something per micro-batch
        policy.micro_batch = -strategy.world.max(-policy.micro_batch)
        if (drawn := next(source, None)) is None:
            raise TrainingError(f"the data ended after {step} of {settings.steps} steps")
        batch, tools = drawn
        try:
            with torch.no_grad(), policy.casts_kept():
                items = halve_until_it_fits(partial(collected, algorithm, batch, tools), policy, undo)
        except StepRefused as error:
            error.samples = described(error.samples, batch, tools)
            for _ in range(settings.steps_per_batch):
                step += 1
                hooks.refused(step, error)
            continue
        items = _without_fillers(items)
        check = None if checked else OnPolicy(rows=min(policy.micro_batch, len(batch)))
        parts, moved = _parts(items, settings.steps_per_batch), False
        for i in range(len(parts)):
            set_learning_rate(strategy.optimizer, learning_rate(settings, step))
            step += 1
            try:
                metrics = halve_until_it_fits(
                    partial(update, algorithm, policy, parts[i], strategy, settings, check), policy, undo
                )
            except StepRefused as error:
                error.samples = described(error.samples, batch, tools)
                hooks.refused(step, error)
                continue
            moved = True
            checked = checked or (check is not None and check.done)
            if "skipped_steps" not in metrics:
                check = None  # the weights are no longer those that collected the items
            if settings.ema is not None:
                policy.move_role(EMA, settings.ema)
            hooks.after_step(step, _samples(batch, i, settings), {**items.metrics, **metrics})
        if moved:
            algorithm.after_batch(policy, step)
        del items, parts  # frees their memory before the next batch is collected


def update(
    algorithm: Algorithm,
    policy: Policy,
    items: Items,
    strategy: Strategy,
    settings: Train,
    check: OnPolicy | None = None,
) -> dict[str, Tensor]:
    """Take one optimizer step on the weighted mean loss of all processes' items.

    Gradients are added up over micro-batches of ``policy.micro_batch`` items, so activation memory does not
    grow with the number of items, and the result does not depend on how they are split. Items of weight 0
    cost nothing.

    A ``check`` is given while the weights are those that collected the items. The first micro-batch has as
    many rows as the rollout had, so both round alike and the on-policy check is exact. If that many rows are
    not available, the check is not made, and ``check.done`` stays False.

    Returns the weighted means (scalars) of the loss and the algorithm's metrics, and the gradient's norm
    before clipping. Returns only ``skipped_steps``, and takes no step, if all weights are 0. Raises
    StepRefused on all processes, and leaves the weights unchanged, if the loss or the gradient of any is not
    finite; AlgorithmError if a weight is negative, or there is not one loss for each item.
    """
    world = strategy.world
    if (items.weight < 0).any():
        raise AlgorithmError(f"items of {algorithm.type!r}: a weight is negative, {items.weight.min():g}")
    total = world.sum(items.weight.sum())
    if not total:
        return {"skipped_steps": items.weight.new_ones(())}
    micro_batches = _micro_batches(items, policy, check, world)
    sums: dict[str, Tensor] = {}
    seen: list[Tensor] = []
    with policy.casts_kept():
        for i, micro_batch in enumerate(micro_batches):
            beat()
            strategy.begin_micro_batch(last=i == len(micro_batches) - 1)
            losses = losses_of(algorithm, micro_batch, policy)
            seen.append(losses.per_item.detach())
            if i == 0 and check is not None and len(micro_batch) == check.rows and finite(seen[0]):
                algorithm.check_on_policy(losses)
                check.done = True
            share = micro_batch.weight / total
            weighted = (losses.per_item * share).sum()
            # a loss that is not finite may have a finite gradient; the factor, 1 otherwise, spoils it
            strategy.backward(weighted * (1 + 0 * weighted.detach()))
            for name, value in {"loss": losses.per_item, **losses.metrics}.items():
                sums[name] = sums.get(name, torch.zeros_like(total)) + (value.detach() * share).sum()
    with not_repeated("in the optimizer's step"):
        norm = strategy.step(settings.max_grad_norm)
    means = _over_all_processes(sums, world)
    if not math.isfinite(norm):
        loss = means["loss"].item()
        samples = suspects(micro_batches, seen, every=math.isfinite(loss))
        raise StepRefused(f"the loss ({loss:.6g}) or the gradient's norm ({norm:.6g})", samples)
    return {**means, "grad_norm": torch.tensor(norm)}


def _micro_batches(items: Items, policy: Policy, check: OnPolicy | None, world: World) -> list[Items]:
    """The items of positive weight in micro-batches of at most ``policy.micro_batch``, equally many on every
    process.

    The first has ``check.rows`` rows if that many are allowed and available. A process with fewer
    micro-batches than another repeats its first item with weight 0.
    """
    size = policy.micro_batch
    first = check.rows if check is not None and check.rows <= size else size
    counting = _counting(items, size if policy.compiled else 1)
    micro_batches = [counting.take(slice(0, first))] if len(counting) else []
    micro_batches += counting.take(slice(first, None)).split(size)
    return micro_batches + [_filler(items)] * (world.max(len(micro_batches)) - len(micro_batches))


def _parts(items: Items, count: int) -> list[Items]:
    """The items in ``count`` parts, each with one item at least. Of several processes, one may have no sample
    in a part, and a transformer cannot compute a forward of no rows."""
    return [part if len(part) else _filler(items) for part in items.parts_by_sample(count)]


def _filler(items: Items) -> Items:
    """The first item, with weight 0."""
    one = items.take(slice(0, 1))
    return replace(one, weight=torch.zeros_like(one.weight))


def _counting(items: Items, multiple: int) -> Items:
    """The items of positive weight in their order, and as many others as make their number a multiple of
    ``multiple``, if there are as many. Compiled blocks then see few sizes, each of which takes a minute."""
    counts = (items.weight != 0).to(torch.int8)  # NaN counts too, so that its step is refused
    number = -(-int(counts.sum()) // multiple) * multiple
    return items.take(torch.argsort(counts, descending=True, stable=True)[:number])


def _over_all_processes(sums: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Every process's ``sums`` added up, in one message."""
    if world.size == 1:
        return sums
    added = world.sum(torch.stack([value.double() for value in sums.values()]))
    return dict(zip(sums, added, strict=True))


def _without_fillers(items: Items) -> Items:
    """``items`` with weight 0 for those that only fill the batch up."""
    return replace(items, weight=torch.where(items.sample_index < 0, 0, items.weight))


def _samples(batch: Batch, part: int, settings: Train) -> int:
    """Samples of all processes in one part of the batch; the parts add up to the batch's total."""
    before, after = (batch.total * n // settings.steps_per_batch for n in (part, part + 1))
    return after - before


def _undo(strategy: Strategy) -> bool:
    """Remove the gradients of a failed attempt; return whether it may be repeated."""
    strategy.zero_grad()
    # with several processes, the others would wait for what this one has already sent
    return strategy.world.size == 1 and strategy.repeatable
