"""Stratified draws: one from each of k equal parts of a range, so that together they cover it evenly."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified(u: Tensor) -> Tensor:
    """One point in each of k equal parts of [0, 1], in order, (n, k), from ``u`` (n, k) in [0, 1)."""
    count = u.shape[1]
    return (torch.arange(count, device=u.device) + u) / count


def stratified_steps(u: Tensor, first: int, end: int) -> Tensor:
    """One step in each of k parts of [first, end), in order, (n, k) int64, from ``u`` (n, k) in [0, 1).

    Part i has the steps from first + floor(i (end - first) / k) on. If there are fewer steps than parts, some
    parts are empty, and give the step at which they begin.
    """
    count = u.shape[1]
    bounds = first + torch.arange(count + 1, device=u.device) * (end - first) // max(count, 1)
    lower, upper = bounds[:-1], bounds[1:]
    return lower + (u * (upper - lower)).long()
