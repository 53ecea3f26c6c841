"""Does a forward and backward run at all? Tried with a gradient of 0, of which nothing stays."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from posttrain.condition import Conditions
from posttrain.sampling.prompts import encode
from posttrain.support.device import peak_memory, reset_peak_memory, synchronize

if TYPE_CHECKING:
    from posttrain.data.batches import Feed
    from posttrain.model import FlowModel
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy.policy import Policy

Sample = tuple[torch.Tensor, Conditions]
"""Latents (c, h, w), and encoded prompts of which the first row is the empty one's."""


def blank(model: FlowModel, feed: Feed) -> Sample:
    """Latents (c, h, w) of the stage's largest image, and the encoded empty prompt."""
    conditions, _ = encode(model, [])
    return torch.zeros(model.latent_shape(*feed.largest), device=model.device), conditions


def try_out(policy: Policy, strategy: Strategy, sample: Sample, rows: int) -> None:
    """A forward and backward on ``rows`` of the ``sample``."""
    latents, conditions = sample
    device, spent = latents.device, policy.forward_equivalents
    empty = conditions.rows(torch.zeros(rows, dtype=torch.int64, device=device))
    sigma = torch.full((rows,), 0.5, device=device)
    try:
        strategy.begin_micro_batch(last=False)
        strategy.backward(policy.velocity(latents.repeat(rows, 1, 1, 1), sigma, empty).sum() * 0.0)
    finally:
        strategy.zero_grad()
        policy.forward_equivalents = spent


def timed(policy: Policy, strategy: Strategy, sample: Sample, rows: int) -> tuple[float, int]:
    """Seconds of :func:`try_out`, and bytes at its peak on top of what was held before."""
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
