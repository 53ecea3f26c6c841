"""Groups of samples of one prompt, scored and compared: the base class of Flow-GRPO and DiffusionNFT."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Items, Tools, Verdict
from posttrain.distributed.world import ALONE, World
from posttrain.flow.advantages import Mixing, has_spread, mean_group_std, mixed_advantages, weighted
from posttrain.policy import Policy


class Online(Algorithm, ABC):
    """Sample ``group_size`` images of each prompt, and learn from their scores relative to each other.

    Group-relative advantages: Flow-GRPO, arXiv:2505.05470, eq. 4.
    """

    needs: ClassVar = "rewards"

    group_size: int = Field(24, ge=2)
    """Samples of one prompt; advantages are relative to them."""
    num_steps: int = Field(10, ge=2)
    """Sampling steps of the rollout."""
    timestep_fraction: float = Field(0.99, gt=0, le=1)
    """The share of the sampling steps that is trained: int(num_steps * timestep_fraction) steps. Flow-GRPO
    trains the first ones, because the density of the last step, to sigma 0, is too narrow; DiffusionNFT
    trains a random choice for each sample."""
    global_std: bool = True
    """Divide advantages by the standard deviation of all rewards of the batch, not of the group."""
    adv_clip_max: float = Field(5.0, gt=0)
    """Advantages are clamped to [-adv_clip_max, adv_clip_max]."""
    reward_mixing: Mixing = "rewards"
    """Sum several rewards and compare the sums (``rewards``), or sum each reward's own advantages
    (``advantages``)."""

    @property
    def samples_per_prompt(self) -> int:
        return self.group_size

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
        """Velocities (n, c, h, w) of roles at the items, by the name of the field that the loss reads.

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
        assert tools.judge is not None, "needs = 'rewards'"
        assert batch.group is not None, "needs = 'rewards'"
        fields, own_verdict = self._sampled_and_scored(batch, tools)
        verdict = _of_all_processes(own_verdict, tools.world)
        group, weights = tools.world.gather(batch.group.cpu()), tools.judge.weights
        advantage = mixed_advantages(
            verdict.rewards, weights, group, global_std=self.global_std, mixing=self.reward_mixing
        )
        clamped = advantage.clamp(-self.adv_clip_max, self.adv_clip_max).float()
        trained = self.trained_mask(clamped).float()
        items = _items(batch, fields, tools.world.local(clamped), tools.world.local(trained))
        items = self.with_frozen_velocities(items, tools.policy, tools.world)
        metrics = _reward_metrics(verdict, weights, group)
        metrics |= {
            "samples_trained": trained.mean(),
            "advantages": advantage,
            "item_bytes": torch.tensor(float(items.nbytes)),
        }
        return replace(items, metrics=metrics)

    def _sampled_and_scored(self, batch: Batch, tools: Tools) -> tuple[dict[str, Tensor], Verdict]:
        """The items' fields, (n, items per sample, ...), and the scores of this process's samples.

        Samples are drawn in micro-batches; rewards score one micro-batch while the next is drawn. The first
        reward that fails stops the rollout with its own error.
        """
        assert tools.judge is not None, "needs = 'rewards'"
        pending: list[Future[Verdict]] = []
        parts: list[dict[str, Tensor]] = []
        try:
            for start in range(0, len(batch), tools.policy.micro_batch):
                for future in pending:
                    if future.done():
                        future.result()  # raises the error of a reward that failed
                index = slice(start, start + tools.policy.micro_batch)
                micro_batch = batch.take(index)
                latents, fields = self.rollout(micro_batch, replace(tools, draws=tools.draws.take(index)))
                pending.append(tools.judge.submit(latents, micro_batch))
                parts.append(fields)
            verdict = Verdict.cat([future.result() for future in pending])
        finally:
            for future in pending:
                future.cancel()  # after an error no score that is still to come is needed
        # each part is freed as soon as it is joined: the fields are the largest tensors of an iteration
        return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}, verdict


def _of_all_processes(verdict: Verdict, world: World) -> Verdict:
    """The scores of all processes' samples, in the order of the ranks."""
    return Verdict(
        {name: world.gather(scores) for name, scores in verdict.rewards.items()},
        {name: world.gather(scores) for name, scores in verdict.details.items()},
    )


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


def _reward_metrics(verdict: Verdict, weights: Mapping[str, float], group: Tensor) -> dict[str, Tensor]:
    """What to record of the scores: the weighted sum's mean and spread, and the mean of each score."""
    total = weighted(verdict.rewards, weights)
    metrics = {
        "reward": total.mean(),
        "reward_std": total.std(correction=0),
        "reward_group_std": mean_group_std(total, group),
        "groups_without_spread": 1 - has_spread(total, group).double().mean(),
    }
    scores = {**verdict.rewards, **verdict.details}
    return metrics | {f"reward/{name}": values.mean() for name, values in scores.items()}
