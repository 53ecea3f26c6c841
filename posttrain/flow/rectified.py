"""Rectified flow: the relations between clean latents, noise, velocity and sigma, and stochastic steps.

One convention everywhere: x_sigma = (1 - sigma) x0 + sigma noise, so the velocity is v = dx/dsigma =
noise - x0. Sigma runs from 1 (noise) to 0 (clean), and a sampling step has sigma_next < sigma. Tensors are
(n, ...) with one sigma per row, (n,). Random draws are arguments. Sources: Lipman et al. 2022,
arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Dynamics = Literal["flow_sde", "sde", "cps", "simple", "dance"]
"""Kinds of stochastic steps; see :func:`stochastic_step`. HY-SOAR uses the same names, but for ``dance``."""


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """``sigma`` (n,) as (n, 1, ..., 1), with as many axes as ``like``."""
    return sigma.view(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noisy latents (1 - sigma) x0 + sigma noise, (n, ...)."""
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def predicted_x0(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents (n, ...) that velocity ``v`` at ``x`` predicts: x - sigma v."""
    return x - expand(sigma, x) * v


def predicted_noise(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The noise (n, ...) that velocity ``v`` at ``x`` predicts: x + (1 - sigma) v."""
    return x + (1 - expand(sigma, x)) * v


def shift_sigma(t: Tensor, shift: float) -> Tensor:
    """Sigma at uniform time ``t`` in [0, 1]: shift t / (1 + (shift - 1) t) (arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def guided(v_cond: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance v_u + scale (v_c - v_u) (Ho & Salimans 2022, arXiv:2207.12598)."""
    return v_uncond + scale * (v_cond - v_uncond)


def stochastic_step(
    dynamics: Dynamics,
    x: Tensor,
    v: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: float,
    sigma_max: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Mean (n, ...) and standard deviation (n, 1, ...) of a random step from ``sigma`` to ``sigma_next``.

    The next latents are ``mean + std * noise``. ``x`` and ``v`` are (n, ...), the sigmas (n,), with sigma >
    sigma_next. ``noise_level`` is a (Flow-GRPO), eta (DanceGRPO) or c (SOAR).

    - ``flow_sde``: the SDE with the ODE's marginals (Flow-GRPO, arXiv:2505.05470, eq. 9). Its std grows
      without bound towards sigma = 1. Above ``sigma_max``, the grid's next sigma below 1, it is computed from
      1 - ``sigma_max``.
    - ``cps``: coefficients-preserving sampling (arXiv:2509.05952). The total noise is exactly sigma_next.
    - ``sde``: predicts x0 and adds new noise up to sigma_next. ``noise_level`` has no effect.
    - ``dance``: an SDE of constant diffusion (DanceGRPO, arXiv:2505.07818), with std noise_level
      sqrt(sigma - sigma_next).
    - ``simple``: an Euler step plus noise of std noise_level sqrt(sigma - sigma_next). Its marginals are not
      the ODE's.
    """
    s, s_next = expand(sigma, x), expand(sigma_next, x)
    dt = s_next - s
    if dynamics == "simple":
        return x + v * dt, noise_level * (-dt).sqrt()
    if dynamics == "dance":
        drift = v + 0.5 * noise_level**2 * (x - (1 - s) * predicted_x0(x, v, sigma)) / s**2
        return x + drift * dt, noise_level * (-dt).sqrt()
    if dynamics == "sde":
        return (1 - s_next) * predicted_x0(x, v, sigma), s_next
    if dynamics == "cps":
        std = s_next * math.sin(noise_level * math.pi / 2)
        kept = (s_next**2 - std**2).clamp(min=0).sqrt()
        return (1 - s_next) * predicted_x0(x, v, sigma) + kept * predicted_noise(x, v, sigma), std
    below = torch.as_tensor(sigma_max, dtype=s.dtype, device=s.device)
    diffusion = flow_sde_diffusion(s, below, noise_level)
    mean = x * (1 + diffusion**2 / (2 * s) * dt) + v * (1 + diffusion**2 * (1 - s) / (2 * s)) * dt
    return mean, diffusion * (-dt).sqrt()


def flow_sde_diffusion(sigma: Tensor, sigma_max: Tensor, noise_level: float) -> Tensor:
    """The diffusion coefficient a sqrt(sigma / (1 - sigma)) of Flow-GRPO (arXiv:2505.05470).

    The divisor is at least 1 - ``sigma_max``, so the coefficient is finite at sigma = 1 and just below it.
    """
    return noise_level * (sigma / (1 - torch.minimum(sigma, sigma_max))).sqrt()


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density (n,) of ``x`` (n, ...), as the mean, not the sum, over all axes but the first.

    Flow-GRPO's published code takes the mean too; its clip ranges of 1e-4 and below are for means.
    """
    density = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
