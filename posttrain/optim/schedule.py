"""The learning rate of every optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from posttrain.optim.settings import Train

# progress after the warm-up, in [0, 1) -> factor on the learning rate
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}


def learning_rate(settings: Train, finished: int) -> float:
    """The learning rate of the next optimizer step when ``finished`` steps have been taken.

    It rises linearly over ``warmup_steps``, whose last step has the full rate, and then follows ``schedule``.
    """
    if finished < settings.warmup_steps:
        return settings.learning_rate * (finished + 1) / settings.warmup_steps
    progress = (finished - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.learning_rate * SCHEDULES[settings.schedule](progress)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Let the optimizer's next step use ``value`` for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value
