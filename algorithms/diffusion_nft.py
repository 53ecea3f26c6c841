"""DiffusionNFT: flow matching that rewards steer between two implicit policies (arXiv:2509.16117)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms._online import Online, noised, trained_velocity
from posttrain.flow import predicted_x0
from posttrain.flow.sampling_settings import GUIDANCE
from posttrain.flow.solvers import Solver
from posttrain.policy import Policy

AdvMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]


class DiffusionNFT(Online):
    """Move the velocity towards the old policy's good samples and away from its bad ones.

    Items: latents, x0, old_velocity and, with a ``kl_weight``, reference_velocity (n, c, h, w); sigma,
    advantage, prompt_index, sample_index (n,).
    """

    type: Literal["diffusion_nft"] = "diffusion_nft"

    solver: Solver = "dpm2"
    """Solver of the rollout. No step of the rollout is trained, so it is deterministic and of any order."""
    guidance_scale: Annotated[float, GUIDANCE] = Field(default=1.0, ge=0)
    """Guidance of the rollout; 1 is none. Training has no classifier-free guidance, so 1 samples from the
    velocity that is trained. A model that takes the scale as an input (FLUX.1 dev) is trained at the same."""
    beta: float = Field(default=0.1, gt=0, le=1)
    """Distance of the implicit positive and negative policies from the old policy (section 3.1)."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the squared distance between the velocities of the policy and of the reference."""
    adv_mode: AdvMode = "all"
    """The part of an advantage that is used: all of it; its positive or its negative part, else 0; 1 if it is
    positive, else 0 (``one_only``); or its sign (``binary``)."""
    decay_type: Literal[0, 1, 2] = 1
    """The old policy's decay after t optimizer steps. 0: always 0. 1: min(0.001 t, 0.5). 2: 0 up to step 75,
    then min(0.0075 (t - 75), 0.999)."""

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({"old", "reference"} if self.kl_weight else {"old"})

    def rollout(self, batch: Batch, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = self.sampled(batch, tools, self.guidance_scale, self.solver, "old")
        grid = torch.tensor(tools.sigmas(self.num_steps)[:-1], device=x0.device)
        count = max(self.trained_steps, 1)
        sigma = grid[tools.draws.permutations("times", self.num_steps)][:, :count]
        noise = tools.draws.normal("noise", (count, *x0.shape[1:]))
        return x0, {**noised(batch, x0, sigma, noise), "x0": x0[:, None].expand_as(noise)}

    def trained_mask(self, advantage: Tensor) -> Tensor:
        return torch.ones_like(advantage, dtype=torch.bool)

    def frozen_velocities(self, items: Items, policy: Policy) -> dict[str, Tensor]:
        def velocity_of(role: str) -> Tensor:
            with policy.using(role):
                # where the policy has the role's weights, the loss's distance is then 0 to the bit
                return self._velocity(items, policy, repeated=True)

        velocities = {"old_velocity": velocity_of("old")}
        if self.kl_weight:
            velocities["reference_velocity"] = velocity_of("reference")
        return velocities

    def loss(self, items: Items, policy: Policy) -> Losses:
        v = self._velocity(items, policy)
        v_old = items.old_velocity
        r = optimality(items.advantage, self.adv_mode, self.adv_clip_max)
        positive, negative = implicit_losses(v, v_old, items.latents, items.x0, items.sigma, self.beta)
        policy_loss = self.adv_clip_max / self.beta * (r * positive + (1 - r) * negative)
        metrics = {
            "policy_loss": policy_loss.float(),
            "positive_loss": positive.float(),
            "negative_loss": negative.float(),
            "optimality": r,
            "old_distance": (v - v_old).square().flatten(1).mean(1),
        }
        if not self.kl_weight:
            return Losses(policy_loss, metrics)
        kl = (v - items.reference_velocity).square().flatten(1).mean(1)
        return Losses(policy_loss + self.kl_weight * kl, {**metrics, "kl": kl})

    def _velocity(self, items: Items, policy: Policy, *, repeated: bool = False) -> Tensor:
        return trained_velocity(items, policy, self.guidance_scale, repeated=repeated)

    def after_batch(self, policy: Policy, step: int) -> None:
        policy.move_role("old", old_decay(self.decay_type, step))


def optimality(advantage: Tensor, mode: AdvMode, clip: float) -> Tensor:
    """The probability r (n,) in [0, 1] that a sample is optimal, from its advantage (n,) (section 3.2).

    r = 1/2 + a / (2 clip), where a is the part of the advantage that ``mode`` uses, within [-clip, clip].
    """
    modes = {
        "all": lambda a: a,
        "positive_only": lambda a: a.clamp(min=0),
        "negative_only": lambda a: a.clamp(max=0),
        "one_only": lambda a: (a > 0).to(a),
        "binary": lambda a: a.sign(),
    }
    a = modes[mode](advantage.clamp(-clip, clip))
    return (a / (2 * clip) + 0.5).clamp(0, 1)


def implicit_losses(
    v: Tensor, v_old: Tensor, x: Tensor, x0: Tensor, sigma: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Losses (n,) float64 of the implicit positive and negative velocities at ``x`` (section 3.1, eq. 5).

    The positive velocity is (1 - beta) v_old + beta v, the negative one (1 + beta) v_old - beta v. The loss
    of each is the mean squared error of the x0 that it predicts, divided by the mean absolute error of the
    same x0. The divisor has no gradient and is at least 1e-5, as published. Computed in float64, on MPS in
    float32.
    """

    def loss(velocity: Tensor) -> Tensor:
        error = (predicted_x0(x, velocity, sigma) - x0).flatten(1)
        wide = torch.float32 if error.device.type == "mps" else torch.float64  # MPS has no float64
        scale = error.detach().to(wide).abs().mean(1).clamp(min=1e-5)
        return error.square().to(wide).mean(1) / scale

    return loss(beta * v + (1 - beta) * v_old), loss((1 + beta) * v_old - beta * v)


def old_decay(decay_type: int, step: int) -> float:
    """The old policy's decay after ``step`` optimizer steps; ``decay_type`` is numbered as published."""
    if decay_type == 0:
        return 0.0
    if decay_type == 1:
        return min(0.001 * step, 0.5)
    return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
