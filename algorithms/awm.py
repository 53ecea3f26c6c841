"""AWM, advantage-weighted matching: policy gradient on flow matching's loss (arXiv:2509.25050)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms._online import (
    Online,
    check_ratio,
    clipped_loss,
    noised,
    ratio_metrics,
    trained_velocity,
)
from posttrain.flow.sampling_settings import GUIDANCE
from posttrain.flow.solvers import Solver
from posttrain.flow.strata import stratified, stratified_steps
from posttrain.policy import Policy
from posttrain.registry import field_error

TimeType = Literal["discrete", "discrete_wo_init", "discrete_with_init", "logit_normal", "uniform"]
Weighting = Literal["uniform", "t", "t_squared", "huber", "ghuber"]
KLWeighting = Literal["uniform", "elbo"]

LEAST_SIGMA = 0.01
"""The least sigma of ``logit_normal``, as in the published code."""
LEAST_TIME = 0.2
"""The least time of ``uniform`` before the shift, as in the published code."""
NOISE_LEVEL = 0.7
"""The noise level of the SDE whose standard deviation weights the KL terms of ``elbo``, as published."""
TINY = 1e-10
"""Added to an error before its root or power, whose slope at 0 is infinite; as in the published code."""


class AWM(Online):
    """Make good samples likelier and bad ones less likely, as flow matching measures likelihood.

    Items, one for each noise level of each sample: latents, target (n, c, h, w); sigma, old_log_prob,
    advantage, prompt_index, sample_index (n,); with an ``ema_beta`` old_velocity and with a ``beta``
    reference_velocity (n, c, h, w).
    """

    type: Literal["awm"] = "awm"

    num_steps: int = Field(default=14, ge=2, le=10_000)
    """Sampling steps of the rollout."""
    timestep_fraction: float = Field(default=0.9, gt=0, le=1)
    """The discrete time types draw from the first int(num_steps * timestep_fraction) sampling steps."""
    solver: Solver = "dpm2"
    """Solver of the rollout. No step of the rollout is trained, so any will do."""
    guidance_scale: Annotated[float, GUIDANCE] = Field(default=1.0, ge=0)
    """Guidance of the rollout; 1 is none. Training has no classifier-free guidance, so 1 samples from the
    velocity that is trained. A model that takes the scale as an input (FLUX.1 dev) is trained at the same."""
    off_policy: bool = False
    """Sample from the old policy, and compare its likelihood in the probability ratio. If false, both are
    those of the weights at the beginning of the batch."""
    train_timesteps: int = Field(default=6, ge=1, le=1000)
    """Noise levels at which a sample is trained, each with noise of its own."""
    time_type: TimeType = "discrete_wo_init"
    """How the noise levels are drawn, one from each of ``train_timesteps`` strata. ``discrete``: steps of the
    sampling grid; ``discrete_wo_init``: without the first, sigma = 1; ``discrete_with_init``: the first
    always, and others. ``logit_normal``: the logit of the time is standard normal. ``uniform``: the time is
    uniform in [0.2, 1]. Times are shifted to sigmas as the model's are. The samples of a prompt share their
    noise levels, but for ``uniform``."""
    weighting: Weighting = "ghuber"
    """The log-probability for a mean squared error e at sigma. ``uniform``: -e. ``t``: -sigma e.
    ``t_squared``: -sigma^2 e. ``huber``: -sigma sqrt(e). ``ghuber``: -sigma e^p / p, where p is
    ``ghuber_power``. The smaller p, the less a large error counts."""
    ghuber_power: float = Field(default=0.25, gt=0, le=1)
    """The power p of ``ghuber``."""
    advantage_max: float = Field(default=1.0, gt=0)
    """Advantages, clamped to [-adv_clip_max, adv_clip_max], are scaled to [-advantage_max, advantage_max]."""
    clip_range: float = Field(default=1.0, gt=0)
    """The ratio is clipped to [1 - clip_range, 1 + clip_range]."""
    beta: float = Field(default=0.003, ge=0)
    """Weight of the squared distance between the velocities of the policy and of the reference; 0 needs no
    reference."""
    ema_beta: float = Field(default=1.0, ge=0)
    """Weight of the squared distance between the velocities of the policy and of the old policy."""
    kl_weighting: KLWeighting = "uniform"
    """Weight of both squared distances at sigma. ``uniform``: 1. ``elbo``: 1 / (2 std^2), with std = 0.7
    sqrt(sigma / (1 - min(sigma, 0.99)))."""
    kl_ema_decay: float = Field(default=0.3, ge=0, le=1)
    """The old policy is a moving average of the policy; after each batch it moves by this decay."""
    kl_ema_decay_type: Literal["linear", "constant"] = "linear"
    """The decay after t optimizer steps: min(0.001 t, kl_ema_decay) if ``linear``, else kl_ema_decay."""

    @model_validator(mode="after")
    def _steps_exist(self) -> Self:
        first, end = self.step_range
        if self.discrete and end <= first:
            share = f"{self.timestep_fraction:g} of {self.num_steps} steps"
            words = f"{share} leaves none from step {first} on: use at least {(first + 1) / self.num_steps:g}"
            raise field_error(("timestep_fraction",), words)
        return self

    @model_validator(mode="after")
    def _every_option_is_used(self) -> Self:
        no_grid = not self.discrete and f"with the time_type {self.time_type!r}: it has no steps"
        no_power = self.weighting != "ghuber" and f"with the weighting {self.weighting!r}"
        no_kl = not self.beta and not self.ema_beta and "where beta and ema_beta, the weights, are 0"
        no_old = "old" not in self.roles and "on-policy without an ema_beta: there is no old policy"
        unused = {
            "timestep_fraction": no_grid,
            "ghuber_power": no_power,
            "kl_weighting": no_kl,
            "kl_ema_decay": no_old,
            "kl_ema_decay_type": no_old,
        }
        for name, why in unused.items():
            if why and getattr(self, name) != type(self).model_fields[name].default:
                raise field_error((name,), f"has no effect {why}")
        return self

    @property
    def discrete(self) -> bool:
        """Whether noise levels are steps of the sampling grid."""
        return self.time_type.startswith("discrete")

    @property
    def step_range(self) -> tuple[int, int]:
        """The steps [first, end) of the sampling grid that are divided into strata."""
        return int(self.time_type != "discrete"), self.trained_steps

    @property
    def roles(self) -> frozenset[str]:
        old = self.ema_beta or self.off_policy
        return frozenset(({"reference"} if self.beta else set()) | ({"old"} if old else set()))

    def rollout(self, batch: Batch, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        role = "old" if self.off_policy else None
        x0 = self.sampled(batch, tools, self.guidance_scale, self.solver, role)
        sigma = self.noise_levels(batch, tools, tools.sigmas(self.num_steps))
        noise = tools.draws.normal("noise", (self.train_timesteps, *x0.shape[1:]))
        return x0, {**noised(batch, x0, sigma, noise), "target": noise - x0[:, None]}

    def noise_levels(self, batch: Batch, tools: Tools, sigmas: list[float]) -> Tensor:
        """The sigmas (n, train_timesteps) at which each sample is trained."""
        assert batch.group is not None, "needs = 'prompts'"
        draws = tools.draws if self.time_type == "uniform" else tools.draws.of(batch.group.tolist())
        u, model, size = (
            draws.uniform("times", (self.train_timesteps,)),
            tools.policy.model,
            batch.latents.shape[-2:],
        )
        if self.time_type == "logit_normal":
            t = torch.sigmoid(torch.special.ndtri(stratified(u)))
            return model.sigma(t, size).clamp(min=LEAST_SIGMA)
        if self.time_type == "uniform":
            return model.sigma(LEAST_TIME + (1 - LEAST_TIME) * stratified(u), size)
        first, end = self.step_range
        if self.time_type == "discrete_with_init":
            steps = torch.cat([torch.zeros_like(u[:, :1]).long(), stratified_steps(u[:, 1:], first, end)], 1)
        else:
            steps = stratified_steps(u, first, end)
        return torch.tensor(sigmas, device=u.device)[steps]

    def trained_mask(self, advantage: Tensor) -> Tensor:
        # samples of advantage 0 count too, as published: the KL terms hold the policy at them
        return torch.ones_like(advantage, dtype=torch.bool)

    def frozen_velocities(self, items: Items, policy: Policy) -> dict[str, Tensor]:
        def velocity_of(role: str | None) -> Tensor:
            with policy.using(role):
                # before the first update the loss's ratio is then 1 to the bit, and its distances 0
                return trained_velocity(items, policy, self.guidance_scale, repeated=True)

        fields: dict[str, Tensor] = {}
        old = velocity_of("old") if "old" in self.roles else None
        if old is not None and self.ema_beta:
            fields["old_velocity"] = old
        sampled_by = old if old is not None and self.off_policy else velocity_of(None)
        fields["old_log_prob"] = self._log_prob(sampled_by, items)
        if self.beta:
            fields["reference_velocity"] = velocity_of("reference")
        return fields

    def loss(self, items: Items, policy: Policy) -> Losses:
        v = trained_velocity(items, policy, self.guidance_scale)
        log_prob = self._log_prob(v, items)
        ratio = (log_prob - items.old_log_prob).exp()
        advantage = items.advantage * (self.advantage_max / self.adv_clip_max)
        loss = policy_loss = clipped_loss(ratio, advantage, self.clip_range)
        metrics = {"policy_loss": policy_loss.float(), "log_prob": log_prob.float()}
        metrics |= ratio_metrics(ratio.float(), self.clip_range)
        for name, weight, role in (("kl", self.beta, "reference"), ("ema_kl", self.ema_beta, "old")):
            if weight:
                distance = mean_square(v - items.fields[f"{role}_velocity"])
                if self.kl_weighting == "elbo":
                    distance = distance / (2 * sde_variance(items.sigma))
                loss = loss + weight * distance
                metrics[name] = distance.float()
        return Losses(loss, metrics)

    def _log_prob(self, v: Tensor, items: Items) -> Tensor:
        return matching_log_prob(
            mean_square(v - items.target), items.sigma, self.weighting, self.ghuber_power
        )

    def check_on_policy(self, losses: Losses) -> None:
        if not self.off_policy:
            check_ratio(losses, self.clip_range)

    def after_batch(self, policy: Policy, step: int) -> None:
        if "old" in self.roles:
            growing = self.kl_ema_decay_type == "linear"
            policy.move_role("old", min(0.001 * step if growing else 1, self.kl_ema_decay))


def mean_square(difference: Tensor) -> Tensor:
    """The mean square (n,) of ``difference`` (n, ...), in float64, on MPS in float32."""
    wide = torch.float32 if difference.device.type == "mps" else torch.float64  # MPS has no float64
    return difference.to(wide).square().flatten(1).mean(1)


def matching_log_prob(error: Tensor, sigma: Tensor, weighting: Weighting, power: float) -> Tensor:
    """The log-probability (n,) of samples at whose noise levels ``sigma`` (n,) the velocity has the mean
    squared ``error`` (n,).

    Flow matching's loss, negative, takes the place of the log-likelihood. ``power`` is that of ``ghuber``.
    The two Huber losses add 1e-10 to the error and are 0 where it is 0, as in the published code.
    """
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -error * sigma
    if weighting == "t_squared":
        return -error * sigma**2
    if weighting == "huber":
        return -((error + TINY).sqrt() - TINY**0.5) * sigma
    return -((error + TINY) ** power - TINY**power) * sigma / power


def sde_variance(sigma: Tensor) -> Tensor:
    """The variance (n,), per unit of time, of Flow-GRPO's SDE (arXiv:2505.05470) at ``sigma`` (n,)."""
    return NOISE_LEVEL**2 * sigma / (1 - sigma.clamp(max=0.99))
