"""SOAR: flow matching, plus the same loss at off-trajectory points that the model itself would visit.

After Tencent-Hunyuan's HY-SOAR. The model takes one guided sampling step from a noisy sample. Auxiliary
points lie on the line from the end of that step back to the noise; their target velocity leads to the clean
image.

Four deliberate differences from the published code:

- sigma(t) is the closed form and the timestep is exactly 1000 sigma; the published code rounds both.
- Latents, sigmas and targets are float32; the published code has bf16.
- Condition dropout is drawn for each sample, and the rollout keeps the prompt.
- An auxiliary sigma has a floor, because the target divides by it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms._flow_matching import FlowMatching
from posttrain.algorithms._unused import used
from posttrain.flow.rectified import Dynamics, expand, stochastic_step
from posttrain.flow.sampling_settings import GUIDANCE


class SOAR(FlowMatching):
    """Regress the velocity at noisy latents and at auxiliary points beside the model's own guided step.

    Items: those of SFT, and for each path ``trajectory_length`` auxiliary points of every sample.
    """

    type: Literal["soar"] = "soar"

    lambda_aux: float = Field(default=1.0, ge=0)
    """Weight of an auxiliary point, as a multiple of its image's weight. 0 is SFT."""
    num_rollout_paths: int = Field(default=1, ge=1, le=1000)
    """Rollout steps from each sample. The first is the ODE's, the others are stochastic."""
    trajectory_length: int = Field(default=6, ge=0, le=1000)
    """Auxiliary points on each path; 0 is SFT."""
    sde_rollout_type: Dynamics = "flow_sde"
    """Kind of the stochastic steps; see :func:`posttrain.flow.stochastic_step`."""
    sde_noise_scale: float = Field(default=0.5, ge=0)
    """Noise level of the stochastic steps; see :func:`posttrain.flow.stochastic_step`."""
    cfg_scale_sampling: Annotated[float, GUIDANCE] = Field(default=4.5, ge=0)
    """Guidance of the rollout step; 1 is none."""
    num_sampling_steps: int = Field(default=40, ge=1, le=10_000)
    """Length of the rollout step: 1 / num_sampling_steps in t."""
    sigma_floor: float = Field(default=0.02, ge=0, lt=1)
    """Least sigma of an auxiliary point. The target divides by sigma, so the few points below 0.02 cause much
    of the gradient's variance. 0 is the published behaviour."""

    @model_validator(mode="after")
    def _every_rollout_option_is_used(self) -> Self:
        one = self.num_rollout_paths == 1 and "with one rollout path, which is the ODE's"
        none = self.sde_rollout_type == "sde" and "with the sde_rollout_type 'sde', whose noise sigma decides"
        return used(self, {"sde_rollout_type": one, "sde_noise_scale": one or none})

    def collect(self, batch: Batch, tools: Tools) -> Items:
        base, noise, t0 = self.base_items(batch, tools)
        if self.lambda_aux == 0 or self.trajectory_length == 0:
            return base
        model, size = tools.policy.model, batch.latents.shape[-2:]
        t1 = (t0 - 1 / self.num_sampling_steps).clamp(min=0)
        sigma0, sigma1 = base.sigma, model.sigma(t1, size)
        v = tools.policy.guided_velocity(
            base.latents, sigma0, batch.prompt_index, batch.conditions, self.cfg_scale_sampling
        )
        grid = model.sigma(torch.tensor(1 - 1 / self.num_sampling_steps), size)
        parts = [base]
        for path in range(self.num_rollout_paths):
            if path == 0:
                start, weight = base.latents + expand(sigma1 - sigma0, v) * v, torch.ones_like(t1)
            else:
                args = (self.sde_rollout_type, base.latents, v, sigma0, sigma1, self.sde_noise_scale)
                mean, std = stochastic_step(*args, sigma_max=grid)
                start = mean + std * tools.draws.normal(f"rollout.{path}", noise.shape[1:])
                # at t1 = 0 the published code keeps the ODE path only; weight 0 instead of no item gives
                # every sample as many items
                weight = (t1 > 0).to(t1)
            fractions = tools.draws.uniform(f"fractions.{path}", (self.trajectory_length,))
            for fraction in fractions.unbind(1):
                latents, sigma, target = auxiliary_point(
                    batch.latents, noise, start, sigma1, fraction, self.sigma_floor
                )
                fields = {"latents": latents, "sigma": sigma, "target": target}
                fields |= {"prompt_index": base.prompt_index, "sample_index": base.sample_index}
                parts.append(Items(self.lambda_aux * weight * base.weight, fields, batch.conditions))
        return Items.cat(parts)


def auxiliary_point(
    x0: Tensor, noise: Tensor, start: Tensor, sigma1: Tensor, fraction: Tensor, sigma_floor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (n, c, h, w), sigma (n,) and target velocity (n, c, h, w) of one auxiliary point.

    ``start`` (n, c, h, w) is the end of a rollout step, at ``sigma1`` (n,). The point lies on the line from
    ``start`` to ``noise``, at sigma = sigma1 + fraction (1 - sigma1), at least ``sigma_floor``; ``fraction``
    (n,) is in [0, 1]. The target (latents - x0) / sigma leads straight to ``x0``. If ``start`` lies on the
    line from ``x0`` to ``noise``, the target is noise - x0, as for SFT.
    """
    sigma = (sigma1 + fraction * (1 - sigma1)).clamp(min=sigma_floor)
    alpha = ((sigma - sigma1) / (1 - sigma1).clamp(min=1e-8)).clamp(0, 1)
    latents = torch.lerp(start, noise, expand(alpha, start))
    return latents, sigma, (latents - x0) / expand(sigma, x0)
