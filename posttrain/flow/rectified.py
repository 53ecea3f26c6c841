"""Rectified flow: how clean latents, noise, velocity and sigma belong together.

One convention everywhere: x_sigma = (1 - sigma) x0 + sigma noise, so the velocity is v = dx/dsigma =
noise - x0; sigma runs from 1 (noise) to 0 (data), and a sampling step has sigma_next < sigma. Tensors are
(n, ...) with one sigma per row, (n,). Every random draw is an argument (Lipman et al. 2022,
arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Dynamics = Literal["flow_sde", "sde", "cps", "simple", "dance"]
"""Names of the stochastic sampling steps, most as HY-SOAR spells them; see :func:`stochastic_step`."""


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """(n,) -> (n, 1, ..., 1) with as many axes as ``like``."""
    return sigma.view(-1, *[1] * (like.ndim - 1))


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noisy latents (1 - sigma) x0 + sigma noise, (n, ...)."""
    sigma = expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def predicted_x0(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that velocity ``v`` at ``x`` points to: x - sigma v."""
    return x - expand(sigma, x) * v


def predicted_noise(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """The noise that velocity ``v`` at ``x`` comes from: x + (1 - sigma) v."""
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

    The next latents are ``mean + std * noise``. ``noise_level`` is a (Flow-GRPO), eta (CPS) or c (SOAR).

    - ``flow_sde``: marginal-preserving SDE (Flow-GRPO, arXiv:2505.05470, eq. 9). Where sigma is exactly
      1 its std diverges; ``sigma_max``, the next lower sigma of the sampling grid, stands in for it.
    - ``cps``: coefficients-preserving sampling (arXiv:2509.05952): the total noise is exactly sigma_next.
    - ``sde``: predicts x0 and noises it again to sigma_next; ``noise_level`` has no part in it.
    - ``dance``: DanceGRPO's SDE of constant diffusion (arXiv:2505.07818): std noise_level sqrt(sigma -
      sigma_next).
    - ``simple``: an Euler step plus noise of noise_level sqrt(sigma - sigma_next); marginals drift.
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
    """The diffusion coefficient a sqrt(sigma / (1 - sigma)) of Flow-GRPO's SDE, finite at sigma = 1."""
    return noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density of ``x``, (n,): the mean, not the sum, over all axes but the first.

    So do Flow-GRPO's published runs, and so their clip ranges of 1e-4 and below have a meaning.
    """
    density = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)
