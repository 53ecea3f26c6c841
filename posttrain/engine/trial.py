"""Runs one forward and backward that leaves no gradient, to see whether it works and what it costs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from posttrain.condition import Conditions
from posttrain.sampling.prompts import encode
from posttrain.support.device import peak_memory, reset_peak_memory, synchronize

if TYPE_CHECKING:
    from posttrain.data.source import BatchSource
    from posttrain.model import FlowModel
    from posttrain.parallel.strategy import Strategy
    from posttrain.policy.policy import Policy

Sample = tuple[torch.Tensor, Conditions]
"""Latents (c, h, w), and encoded prompts whose row 0 is the empty prompt."""


def blank(model: FlowModel, source: BatchSource) -> Sample:
    """Zero latents (c, h, w) of the stage's largest image, and the encoded empty prompt."""
    conditions, _ = encode(model, [])
    return torch.zeros(model.latent_shape(*source.largest), device=model.device), conditions


def try_out(policy: Policy, strategy: Strategy, sample: Sample, rows: int) -> None:
    """Run a forward and backward on ``rows`` copies of the ``sample``, with a gradient of 0.

    Gradients and the policy's count of forward-equivalents are afterwards as before, also after an error.
    """
    latents, conditions = sample
    device, forward_equivalents = latents.device, policy.forward_equivalents
    empty = conditions.rows(torch.zeros(rows, dtype=torch.int64, device=device))
    sigma = torch.full((rows,), 0.5, device=device)
    try:
        strategy.begin_micro_batch(last=False)
        strategy.backward(policy.velocity(latents.repeat(rows, 1, 1, 1), sigma, empty).sum() * 0.0)
    finally:
        strategy.zero_grad()
        policy.forward_equivalents = forward_equivalents


def timed(policy: Policy, strategy: Strategy, sample: Sample, rows: int) -> tuple[float, int]:
    """Seconds of the fastest of three :func:`try_out`, and their peak memory in bytes on top of what was held
    before."""
    device, durations = policy.model.device, []
    reset_peak_memory(device)
    before = peak_memory(device)
    for _ in range(3):  # the first also loads libraries, and compiles
        synchronize(device)
        start = time.perf_counter()
        try_out(policy, strategy, sample, rows)
        synchronize(device)
        durations.append(time.perf_counter() - start)
    return min(durations), max(peak_memory(device) - before, 0)
