"""The training loop: one function, the same for every algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Items, Tools
from posttrain.errors import TrainingError
from posttrain.policy import Policy
from posttrain.randomness import Draws

if TYPE_CHECKING:
    from posttrain.recipe import Train

EMA = "ema"
"""The role of the moving average that is evaluated and exported."""


class Watch(Protocol):
    """What a stage does around the steps: evaluate, save, record."""

    def before_step(self, step: int) -> None:
        """Called with the number of finished steps, before the next batch is drawn."""

    def after_step(self, step: int, samples: int, metrics: dict[str, Tensor]) -> None:
        """Called after optimizer step ``step`` (from 1) with its metrics, still on the device."""


def train(
    algorithm: Algorithm,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Batch, Draws]],
    settings: Train,
    watch: Watch,
    start: int = 0,
) -> None:
    """Take the optimizer steps from ``start`` to ``settings.steps``.

    NOTE: the order matters to an exact resume: what ``before_step`` records is the state before the step's
    batch is drawn, and counters alone say what will be. Raises TrainingError where the batches
    run out or a step is not finite.
    """
    source = iter(batches)
    for step in range(start, settings.steps):
        watch.before_step(step)
        if (drawn := next(source, None)) is None:
            raise TrainingError(f"the data ended after {step} of {settings.steps} steps")
        batch, draws = drawn
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        with torch.no_grad():
            items = algorithm.collect(batch, Tools(policy, draws))
        metrics = update(algorithm, policy, items, optimizer, settings, step + 1)
        algorithm.after_update(policy, step + 1)
        if settings.ema is not None:
            policy.move_role(EMA, settings.ema)
        watch.after_step(step + 1, len(batch), metrics)


def update(
    algorithm: Algorithm,
    policy: Policy,
    items: Items,
    optimizer: torch.optim.Optimizer,
    settings: Train,
    step: int,
) -> dict[str, Tensor]:
    """One optimizer step on the weighted mean of the items' losses, however they are split.

    Each micro-batch is back-propagated at once, so activation memory does not grow with the number of
    items. Returns weighted means of the losses and metrics, and the gradient's norm before clipping.
    Raises TrainingError, with the weights as they were, where the loss or the gradient is not finite.
    """
    total = items.weight.sum()
    sums: dict[str, Tensor] = {}
    optimizer.zero_grad(set_to_none=True)
    for micro in items.split(settings.micro_batch):
        losses = algorithm.loss(micro, policy)
        share = micro.weight / total
        (losses.per_item * share).sum().backward()
        for name, value in {"loss": losses.per_item, **losses.metrics}.items():
            sums[name] = sums.get(name, torch.zeros_like(total)) + (value.detach() * share).sum()
    sums["grad_norm"] = norm = torch.nn.utils.clip_grad_norm_(policy.trained.values(), settings.max_grad_norm)
    # the one host synchronisation of a step: a poisoned update must never reach the weights
    if not math.isfinite(norm.item()):
        raise TrainingError(
            f"step {step}: loss {sums['loss'].item():.6g}, gradient norm {norm.item():.6g} is not finite; "
            "the step was not taken. Try a lower learning_rate, a warm-up, or precision fp32"
        )
    optimizer.step()
    return sums


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


def adamw(policy: Policy, settings: Train) -> torch.optim.AdamW:
    """AdamW over the policy's trained weights, fused where the device has it."""
    return torch.optim.AdamW(
        policy.trained.values(),
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=policy.model.device.type in ("cpu", "cuda"),
    )
