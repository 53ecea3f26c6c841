"""Advantages of samples over their group: the base class of Flow-GRPO, DiffusionNFT and AWM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms._rollouts import Rollouts, reward_metrics
from posttrain.distributed.world import ALONE, World
from posttrain.errors import StepRefused, TrainingError
from posttrain.flow import interpolate
from posttrain.flow.advantages import Mixing, mixed_advantages
from posttrain.policy import Policy


class Online(Rollouts, ABC):
    """Learn from the scores of a group's samples relative to each other.

    Group-relative advantages: Flow-GRPO, arXiv:2505.05470, eq. 4.
    """

    timestep_fraction: float = Field(default=0.99, gt=0, le=1)
    """The share of the sampling steps that is trained: int(num_steps * timestep_fraction) steps. Flow-GRPO
    trains the first ones, because the density of the last step, to sigma 0, is too narrow; DiffusionNFT
    trains a random choice for each sample."""
    global_std: bool = True
    """Divide advantages by the standard deviation of all rewards of the batch, not of the group."""
    adv_clip_max: float = Field(default=5.0, gt=0)
    """Advantages are clamped to [-adv_clip_max, adv_clip_max]."""
    reward_mixing: Mixing = "rewards"
    """Sum several rewards and compare the sums (``rewards``), or sum each reward's own advantages
    (``advantages``)."""

    @property
    def trained_steps(self) -> int:
        """The number of sampling steps that are trained."""
        return int(self.num_steps * self.timestep_fraction)

    @abstractmethod
    def rollout(self, batch: Batch, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean latents (n, c, h, w) of new samples, and the items' fields, (n, items per sample, ...)."""

    @abstractmethod
    def trained_mask(self, advantage: Tensor) -> Tensor:
        """(n,) bool: the samples that are trained, by their clamped advantages (n,)."""

    def frozen_velocities(self, items: Items, policy: Policy) -> dict[str, Tensor]:
        """Velocities (n, c, h, w) of roles at the items, or numbers (n,) made of them, by the name of the
        field that the loss reads.

        Training does not change them, so they are computed once for each batch."""
        del items, policy
        return {}

    def with_frozen_velocities(self, items: Items, policy: Policy, world: World = ALONE) -> Items:
        """``items`` with the fields of :meth:`frozen_velocities`; items that no process needs have 0 there.

        Every process computes as many items as the one that trains most, since sharded weights are gathered
        by all at the same time."""
        trained = (items.weight > 0).to(torch.int8)
        first = torch.argsort(trained, descending=True, stable=True)[: int(world.max(int(trained.sum())))]
        if not len(first):
            return items
        fields = dict(items.fields)
        for name, velocity in self.frozen_velocities(items.take(first), policy).items():
            fields[name] = velocity.new_zeros(len(items), *velocity.shape[1:]).index_copy(0, first, velocity)
        return replace(items, fields=fields)

    def collect(self, batch: Batch, tools: Tools) -> Items:
        fields, verdict, group, weights = self.scored_by_all(batch, tools)
        advantage = mixed_advantages(
            verdict.rewards, weights, group, global_std=self.global_std, mixing=self.reward_mixing
        )
        if not advantage.isfinite().all():  # each score is, but not their sum or its standard deviation
            raise StepRefused("the weighted sum of the rewards")
        clamped = advantage.clamp(-self.adv_clip_max, self.adv_clip_max).float()
        trained = self.trained_mask(clamped).float()
        items = _items(batch, fields, tools.world.local(clamped), tools.world.local(trained))
        items = self.with_frozen_velocities(items, tools.policy, tools.world)
        metrics = reward_metrics(verdict, weights, group)
        metrics |= {
            "samples_trained": trained.mean(),
            "advantages": advantage,
            "item_bytes": torch.tensor(float(items.nbytes)),
        }
        return replace(items, metrics=metrics)


def noised(batch: Batch, x0: Tensor, sigma: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Fields of the samples ``x0`` (n, c, h, w) with ``noise`` (n, k, c, h, w), each at ``sigma`` (n, k)."""
    clean = x0[:, None].expand_as(noise)
    latents = interpolate(clean.flatten(0, 1), noise.flatten(0, 1), sigma.flatten()).view_as(noise)
    return {
        "latents": latents,
        "sigma": sigma,
        "prompt_index": batch.prompt_index[:, None].expand_as(sigma),
    }


def trained_velocity(
    items: Items, policy: Policy, guidance_scale: float, *, repeated: bool = False
) -> Tensor:
    """The velocity (n, c, h, w) at the items that a loss trains in one forward, where the rollout had
    guidance of ``guidance_scale``. For ``repeated`` see :meth:`Policy.velocity`."""
    scale = policy.model.guidance_rule.trained_at(guidance_scale)
    at = (items.latents, items.sigma, items.prompt_index, items.conditions)
    return policy.guided_velocity(*at, scale, repeated=repeated)


def _items(batch: Batch, fields: Mapping[str, Tensor], advantage: Tensor, weight: Tensor) -> Items:
    """Items of ``fields`` (n, items per sample, ...), with each sample's advantage and weight, both (n,)."""
    device, per_sample = batch.prompt_index.device, fields["prompt_index"].shape[1]

    def for_each_item(values: Tensor) -> Tensor:
        return values.to(device)[:, None].expand(-1, per_sample)

    fields = {
        **fields,
        "advantage": for_each_item(advantage),
        "sample_index": for_each_item(batch.sample_index),
    }
    flat = {name: values.flatten(0, 1) for name, values in fields.items()}
    return Items(for_each_item(weight).flatten(), flat, batch.conditions)


def clipped_loss(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """The negative of PPO's clipped surrogate objective (arXiv:1707.06347, eq. 7), (n,)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def ratio_metrics(ratio: Tensor, clip_range: float) -> dict[str, Tensor]:
    """What to record of the probability ratios (n,); :func:`check_ratio` reads it."""
    deviation = (ratio - 1).abs()
    return {"ratio": ratio, "ratio_deviation": deviation, "clip_fraction": (deviation > clip_range).float()}


def check_ratio(losses: Losses, clip_range: float) -> None:
    """To be called before the first update. Raises TrainingError if a ratio is off 1 by more than a tenth of
    ``clip_range``."""
    worst = losses.metrics["ratio_deviation"].max().item()
    if not worst <= 0.1 * clip_range:
        raise TrainingError(
            "before the first update the probability ratio of every step must be 1, but it is off by "
            f"{worst:.3g}; a tenth of the clip_range of {clip_range:g} is allowed. Rollout and "
            "training round log-probabilities differently: train in precision fp32 with tf32 off, or "
            "with a wider clip_range"
        )
