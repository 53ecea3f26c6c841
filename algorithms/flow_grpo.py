"""Flow-GRPO: policy gradient on the steps of a stochastic sampler (Liu et al. 2025, arXiv:2505.05470)."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms._online import Online, check_ratio, clipped_loss, ratio_metrics
from posttrain.flow import expand, log_prob, stochastic_step
from posttrain.flow.sampling_settings import GUIDANCE
from posttrain.policy import Policy
from posttrain.registry import field_error

SDE = Literal["flow_sde", "cps", "dance"]
KL = Literal["without_dt", "with_dt", "velocity_mse"]


class FlowGRPO(Online):
    """Clipped policy gradient; the actions are the steps of a stochastic sampler.

    Items, one for each trained step of each sample: latents, next_latents (n, c, h, w); sigma, sigma_next,
    sigma_max, log_prob, advantage, prompt_index, sample_index (n,); with ``grpo_guard`` mean (n, c, h, w);
    with a ``beta`` reference_velocity (n, c, h, w).
    """

    type: Literal["flow_grpo"] = "flow_grpo"

    sde_type: SDE = "flow_sde"
    """Kind of the stochastic steps; see :func:`posttrain.flow.stochastic_step`."""
    noise_level: float = Field(default=0.7, gt=0)
    """Noise level of the stochastic steps: a of flow_sde and cps, eta of dance."""
    guidance_scale: Annotated[float, GUIDANCE] = Field(default=4.5, ge=0)
    """Guidance of rollout and training; 1 is none. Classifier-free guidance costs twice as much."""
    sde_window_size: int = Field(default=0, ge=0)
    """The number of consecutive steps that are stochastic and trained (Flow-GRPO-Fast). The first of them is
    drawn for each batch. 0: the steps that ``timestep_fraction`` names."""
    sde_window_range: list[int] | None = Field(default=None, min_length=2, max_length=2)
    """Steps [first, end) from which the window is drawn; by default all steps that can be trained."""
    init_same_noise: bool = False
    """Start all samples of a prompt from the same noise (DanceGRPO, arXiv:2505.07818). Their rewards then
    differ only because of the noise of the trained steps."""
    clip_range: float = Field(default=1e-4, gt=0)
    """The ratio is clipped to [1 - clip_range, 1 + clip_range]. The range is small because log-probabilities
    are means over the latents' dimensions."""
    beta: float = Field(default=0.04, ge=0)
    """Weight of the KL divergence from the reference; 0 needs no reference."""
    kl_type: KL = "without_dt"
    """Formula of the KL divergence. ``without_dt``: the squared distance of the two means over 2 std^2, with
    the std per unit of time, as in the published code. ``with_dt``: the same with the step's own std (the
    paper's eq. 10); for cps, whose std has no dt, both are equal. ``velocity_mse``: the squared distance of
    the two velocities."""
    grpo_guard: bool = False
    """Use the regulated ratio and the step weights of GRPO-Guard (arXiv:2510.22319)."""
    drop_zero_advantage: bool = True
    """Do not train samples whose advantage is exactly 0, as published."""

    @field_validator("sde_type", mode="before")
    @classmethod
    def _stochastic(cls, value: object) -> object:
        if isinstance(value, str) and value.lower() in ("ode", "euler", "dpm1", "dpm2", "flow"):
            raise ValueError(
                f"{value!r} is deterministic: its steps have no probability to train. Allowed are "
                "'flow_sde', 'cps' and 'dance'; the algorithm diffusion_nft samples deterministically"
            )
        return value

    @model_validator(mode="after")
    def _trained_steps_exist(self) -> Self:
        share = f"{self.timestep_fraction:g} of {self.num_steps} steps"
        if self.trained_steps > self.num_steps - 1 and not self.sde_window_size:
            words = f"{share} includes the last one, to sigma = 0, which cannot be trained: use less than 1"
            raise field_error(("timestep_fraction",), words)
        if self.trained_steps < 1:
            raise field_error(("timestep_fraction",), f"{share} trains none: use at least 1/{self.num_steps}")
        return self

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.sde_window_range is not None:
            self._check_window_range(*self.sde_window_range)
        first, end = self.window_range
        if self.sde_window_size > end - first:
            words = f"a window of {self.sde_window_size} steps does not fit into the {end - first} steps "
            raise field_error(("sde_window_size",), f"{words}[{first}, {end})")
        return self

    def _check_window_range(self, first: int, end: int) -> None:
        last = self.num_steps - 1
        if not self.sde_window_size:
            raise field_error(("sde_window_range",), "has no effect without an sde_window_size")
        if not 0 <= first < end:
            raise field_error(("sde_window_range",), f"[{first}, {end}] must rise, from 0 or more")
        if end > last:
            words = f"its end {end} is beyond {last}: of {self.num_steps} steps the last is never trained"
            raise field_error(("sde_window_range",), words)
        if self.timestep_fraction != type(self).model_fields["timestep_fraction"].default:
            words = "has no effect beside an sde_window_range: remove one of them"
            raise field_error(("timestep_fraction",), words)

    @model_validator(mode="after")
    def _kl_is_used(self) -> Self:
        if not self.beta and self.kl_type != type(self).model_fields["kl_type"].default:
            raise field_error(("kl_type",), "has no effect where beta, the KL's weight, is 0")
        return self

    @property
    def window_range(self) -> tuple[int, int]:
        """The steps [first, end) that may be trained."""
        if self.sde_window_range is not None:
            return self.sde_window_range[0], self.sde_window_range[1]
        return 0, min(self.trained_steps, self.num_steps - 1)

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({"reference"} if self.beta else ())

    def rollout(self, batch: Batch, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.group is not None, "needs = 'prompts'"
        shape, sigmas = batch.latents.shape[1:], tools.sigmas(self.num_steps)
        first, end = self._stochastic_steps(tools)
        initial = tools.draws.of(batch.group.tolist()) if self.init_same_noise else tools.draws
        x, rows = initial.normal("initial", shape), []
        for i, (s, s_next) in enumerate(pairwise(sigmas)):
            sigma, sigma_next, sigma_max = (torch.full_like(x[:, 0, 0, 0], c) for c in (s, s_next, sigmas[1]))
            trained = first <= i < end
            v = tools.policy.guided_velocity(
                x, sigma, batch.prompt_index, batch.conditions, self.guidance_scale, repeated=trained
            )
            if not trained:
                x = x + expand(sigma_next - sigma, x) * v
                continue
            row = {"latents": x, "sigma": sigma, "sigma_next": sigma_next, "sigma_max": sigma_max}
            mean, std = self._step(x, v, sigma, sigma_next, sigma_max)
            x = mean + std * tools.draws.normal(f"step.{i}", shape)
            row |= {
                "next_latents": x,
                "log_prob": self._log_prob(x, mean, std),
                "prompt_index": batch.prompt_index,
            }
            rows.append(row | ({"mean": mean} if self.grpo_guard else {}))
        return x, {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}

    def _stochastic_steps(self, tools: Tools) -> tuple[int, int]:
        """The steps [first, end) of this batch that are stochastic and trained."""
        first, end = self.window_range
        if not self.sde_window_size:
            return first, end
        first = tools.draws.integer("sde_window", first, end - self.sde_window_size)
        return first, first + self.sde_window_size

    def trained_mask(self, advantage: Tensor) -> Tensor:
        return advantage != 0 if self.drop_zero_advantage else torch.ones_like(advantage, dtype=torch.bool)

    def frozen_velocities(self, items: Items, policy: Policy) -> dict[str, Tensor]:
        if not self.beta:
            return {}
        with policy.using("reference"):
            # at the first update the KL is then 0 to the bit
            return {"reference_velocity": self._velocity(items, policy, repeated=True)}

    def loss(self, items: Items, policy: Policy) -> Losses:
        v = self._velocity(items, policy)
        at_step = (items.sigma, items.sigma_next, items.sigma_max)
        mean, std = self._step(items.latents, v, *at_step)
        change = self._log_prob(items.next_latents, mean, std) - items.log_prob
        if self.grpo_guard:
            change = guarded(change, mean, items.mean, std)
        ratio = change.exp()
        policy_loss = clipped_loss(ratio, items.advantage, self.clip_range)
        if self.grpo_guard:
            policy_loss = policy_loss / (items.sigma - items.sigma_next)
        metrics = {"policy_loss": policy_loss, **ratio_metrics(ratio, self.clip_range)}
        if not self.beta:
            return Losses(policy_loss, metrics)
        reference = items.reference_velocity
        if self.kl_type == "velocity_mse":
            kl = (v - reference).square().flatten(1).mean(1)
        else:
            mean_reference, _ = self._step(items.latents, reference, *at_step)
            kl = mean_distance(mean, mean_reference, self._kl_std(std, items))
        return Losses(policy_loss + self.beta * kl, {**metrics, "kl": kl})

    def check_on_policy(self, losses: Losses) -> None:
        check_ratio(losses, self.clip_range)

    def _velocity(self, items: Items, policy: Policy, *, repeated: bool = False) -> Tensor:
        return policy.guided_velocity(
            items.latents,
            items.sigma,
            items.prompt_index,
            items.conditions,
            self.guidance_scale,
            repeated=repeated,
        )

    def _step(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor
    ) -> tuple[Tensor, Tensor]:
        return stochastic_step(self.sde_type, x, v, sigma, sigma_next, self.noise_level, expand(sigma_max, x))

    def _log_prob(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        # published code leaves out the normaliser and 1 / (2 std^2); GRPO-Guard's formula needs both
        if self.sde_type == "cps" and not self.grpo_guard:
            return -(x - mean).square().flatten(1).mean(1)
        return log_prob(x, mean, std)

    def _kl_std(self, std: Tensor, items: Items) -> Tensor:
        if self.kl_type == "with_dt" or self.sde_type == "cps":
            return std
        return std / expand(items.sigma - items.sigma_next, std).sqrt()


def mean_distance(mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """KL divergence (n,) of two Gaussians of equal ``std`` (n, 1, ...), as a mean over dimensions."""
    return ((mean - reference).square() / (2 * std**2)).flatten(1).mean(1)


def guarded(change: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's regulated log-ratio (n,) (arXiv:2510.22319): mean(noise * (mean - mean_old)).

    It has mean 0 and the same spread at every step. The plain log-ratio ``change`` (n,) has neither property.
    ``std`` is (n, 1, ...); ``change`` is of Gaussian log-densities with their normaliser.
    """
    std = std.flatten(1).mean(1)
    return (change + (mean - mean_old).square().flatten(1).mean(1) / (2 * std**2)) * std
