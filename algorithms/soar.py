"""SOAR: flow matching, plus the same loss at off-trajectory points that the model itself would visit.

After Tencent-Hunyuan's HY-SOAR. From a noisy sample the model takes one guided sampling step; auxiliary
points lie between where it lands and the noise, and their target velocity leads back to the image.
Different from the published code, on purpose: sigma(t) is the closed form and the model's timestep exactly
1000 sigma (there: rounded to a table), everything is float32, condition dropout is per sample and leaves
the rollout its prompt, and an auxiliary sigma has a floor, since the target divides by it.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms._flow_matching import FlowMatching
from posttrain.flow.rectified import Dynamics, expand, shift_sigma, stochastic_step


class SOAR(FlowMatching):
    """Self-correction at points of the model's own guided step."""

    type: Literal["soar"] = "soar"

    lambda_aux: float = Field(1.0, ge=0)
    """How much an auxiliary point counts against a sample; 0 is SFT."""
    num_rollout_paths: int = Field(1, ge=1)
    """Steps taken from each sample: the first is the ODE's, the others are stochastic."""
    trajectory_length: int = Field(6, ge=0)
    """Auxiliary points on each path; 0 is SFT."""
    sde_rollout_type: Dynamics = "flow_sde"
    """How the stochastic paths step; see :func:`posttrain.flow.stochastic_step`."""
    sde_noise_scale: float = Field(0.5, ge=0)
    """Noise of the stochastic paths."""
    cfg_scale_sampling: float = Field(4.5, ge=0)
    """Guidance of the rollout step."""
    num_sampling_steps: int = Field(40, ge=1)
    """The rollout step is 1 / num_sampling_steps long in t."""
    sigma_floor: float = Field(0.02, ge=0, lt=1)
    """Least sigma of an auxiliary point. Its target divides by sigma: below 0.02 lie few points and much
    of the gradient's variance. 0 is the published behaviour."""

    def collect(self, batch: Batch, tools: Tools) -> Items:
        base, noise, t0 = self.base_items(batch, tools)
        if self.lambda_aux == 0 or self.trajectory_length == 0:
            return base
        shift = tools.policy.model.shift
        t1 = (t0 - 1 / self.num_sampling_steps).clamp(min=0)
        sigma0, sigma1 = base.sigma, shift_sigma(t1, shift)
        v = tools.policy.guided_velocity(
            base.latents, sigma0, batch.prompt_index, batch.conditions, self.cfg_scale_sampling
        )
        grid = shift_sigma(torch.tensor(1 - 1 / self.num_sampling_steps), shift)
        parts = [base]
        for path in range(self.num_rollout_paths):
            if path == 0:
                start, weight = base.latents + expand(sigma1 - sigma0, v) * v, torch.ones_like(t1)
            else:
                args = (self.sde_rollout_type, base.latents, v, sigma0, sigma1, self.sde_noise_scale)
                mean, std = stochastic_step(*args, sigma_max=grid)
                start = mean + std * tools.draws.normal(f"rollout.{path}", noise.shape[1:])
                # at t1 = 0 the published code keeps the ODE path only; weight 0 keeps the counts static
                weight = (t1 > 0).to(t1)
            fractions = tools.draws.uniform(f"fractions.{path}", (self.trajectory_length,))
            for fraction in fractions.unbind(1):
                latents, sigma, target = auxiliary_point(
                    batch.latents, noise, start, sigma1, fraction, self.sigma_floor
                )
                fields = {"latents": latents, "sigma": sigma, "target": target}
                fields |= {"prompt_index": base.prompt_index, "sample_index": base.sample_index}
                parts.append(Items(self.lambda_aux * weight, fields, batch.conditions))
        return Items.cat(parts)


def auxiliary_point(
    x0: Tensor, noise: Tensor, start: Tensor, sigma1: Tensor, fraction: Tensor, sigma_floor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, sigma (n,) and target velocity of the point ``fraction`` (n,) of the way back to the noise.

    ``start`` (n, c, h, w) is where a rollout step landed, at ``sigma1`` (n,). The point has sigma =
    sigma1 + fraction (1 - sigma1), at least ``sigma_floor``, and lies on the line from ``start`` to
    ``noise``; its target (latents - x0) / sigma leads straight to ``x0``. Where ``start`` is on the ray
    from ``x0`` to ``noise`` the target is noise - x0.
    """
    sigma = (sigma1 + fraction * (1 - sigma1)).clamp(min=sigma_floor)
    alpha = ((sigma - sigma1) / (1 - sigma1).clamp(min=1e-8)).clamp(0, 1)
    latents = torch.lerp(start, noise, expand(alpha, start))
    return latents, sigma, (latents - x0) / expand(sigma, x0)
