"""Asks an algorithm for items and losses, and checks what it returns."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Items, Losses, Tools
from posttrain.errors import AlgorithmError
from posttrain.policy.policy import Policy


def collected(algorithm: Algorithm, batch: Batch, tools: Tools) -> Items:
    """The items of ``batch``. Raises AlgorithmError if ``collect`` returns anything else."""
    items = algorithm.collect(batch, tools)
    if not isinstance(items, Items):
        raise AlgorithmError(f"collect of {algorithm.type!r} returned {type(items).__name__}, not Items")
    return items


def losses_of(algorithm: Algorithm, items: Items, policy: Policy) -> Losses:
    """The losses of ``items``. Raises AlgorithmError if there is not one for each, with gradients: a mean
    over the items would be multiplied by every weight, and would depend on the micro-batch."""
    losses = algorithm.loss(items, policy)
    if not isinstance(losses, Losses):
        raise AlgorithmError(f"loss of {algorithm.type!r} returned {type(losses).__name__}, not Losses")
    for name, values in {"per_item": losses.per_item, **losses.metrics}.items():
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if found != (len(items),):
            raise AlgorithmError(
                f"loss of {algorithm.type!r} returned {name} as {found}, not one number for each of "
                f"{len(items)} items, {(len(items),)}"
            )
    if torch.is_grad_enabled() and not losses.per_item.requires_grad:
        raise AlgorithmError(
            f"loss of {algorithm.type!r} returned per_item without gradients: compute it from "
            "policy.velocity, without detach or no_grad"
        )
    return losses
