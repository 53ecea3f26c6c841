"""Deterministic solvers of the sampling ODE: Euler, and DPM-Solver++ of order 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import log
from typing import Literal

from torch import Tensor

Solver = Literal["euler", "dpm1", "dpm2"]
Velocity = Callable[[Tensor, float], Tensor]
"""(latents (n, ...), sigma) -> velocity (n, ...)."""


def trajectory(
    velocity: Velocity, noise: Tensor, sigmas: list[float], solver: Solver = "euler"
) -> Iterator[Tensor]:
    """Yield the latents (n, ...) at every sigma, ``noise`` first.

    ``sigmas`` descend, usually from 1, and end at 0. Each but the last takes one velocity call. ``dpm1`` and
    ``dpm2`` are DPM-Solver++ (multistep, data prediction; Lu et al. 2022, arXiv:2211.01095) with lambda =
    log((1 - sigma) / sigma) and coefficients in float64. lambda is infinite at sigma 1 and 0, so steps from
    or to these are of first order. ``dpm1`` equals Euler up to rounding.
    """
    x, x0_before = noise, None
    yield x
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma)
        if solver == "euler":
            x = x + (sigma_next - sigma) * v
        else:
            x0 = x - sigma * v
            ratio = sigma_next / sigma
            data = x0
            if solver == "dpm2" and x0_before is not None and sigma_next > 0 and sigmas[i - 1] < 1:
                data = x0 + 0.5 * (x0 - x0_before) / _step_ratio(sigmas[i - 1], sigma, sigma_next)
            x = ratio * x + ((1 - sigma_next) - (1 - sigma) * ratio) * data
            x0_before = x0
        yield x


def solve(velocity: Velocity, noise: Tensor, sigmas: list[float], solver: Solver = "euler") -> Tensor:
    """The last latents (n, ...) of :func:`trajectory`."""
    x = noise
    for x in trajectory(velocity, noise, sigmas, solver):  # noqa: B007
        pass
    return x


def _step_ratio(before: float, sigma: float, after: float) -> float:
    """The previous step in lambda divided by the present one (r_0 of DPM-Solver++)."""
    lam = [log((1 - s) / s) for s in (before, sigma, after)]
    return (lam[1] - lam[0]) / (lam[2] - lam[1])
