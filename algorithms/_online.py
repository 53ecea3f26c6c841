"""What Flow-GRPO and DiffusionNFT share: groups of samples of one prompt, scored and compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Items, Tools, Verdict
from posttrain.flow.advantages import Mixing, has_spread, mean_group_std, mixed_advantages, weighted


class Online(Algorithm, ABC):
    """Samples ``group_size`` images of each prompt and learns from how they score beside each other."""

    needs: ClassVar = "rewards"

    group_size: int = Field(24, ge=2)
    """Samples of one prompt; advantages are relative to them."""
    num_steps: int = Field(10, ge=2)
    """Sampling steps of the rollout."""
    timestep_fraction: float = Field(0.99, gt=0, le=1)
    """How many of the sampling steps are trained: int(num_steps * timestep_fraction). Flow-GRPO trains the
    first ones, since its last, to sigma = 0, is too peaked; DiffusionNFT a random choice for each sample."""
    global_std: bool = True
    """Divide advantages by the standard deviation of all rewards of the iteration, not of the group."""
    adv_clip_max: float = Field(5.0, gt=0)
    """Advantages are clamped to +- this."""
    reward_mixing: Mixing = "rewards"
    """Sum several rewards first and compare then (``rewards``), or sum their advantages."""

    @property
    def samples_per_prompt(self) -> int:
        return self.group_size

    @property
    def trained_steps(self) -> int:
        """How many of the sampling steps are trained."""
        return int(self.num_steps * self.timestep_fraction)

    @abstractmethod
    def rollout(self, batch: Batch, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean latents (n, c, h, w) of new samples, and the items' fields, (n, items per sample, ...)."""

    @abstractmethod
    def kept(self, advantage: Tensor) -> Tensor:
        """(n,) bool: which samples are trained on."""

    def collect(self, batch: Batch, tools: Tools) -> Items:
        assert tools.judge is not None, "needs = 'rewards'"
        assert batch.group is not None, "needs = 'rewards'"
        pending: list[Future[Verdict]] = []
        parts: list[dict[str, Tensor]] = []
        try:
            for start in range(0, len(batch), tools.policy.micro_batch):
                for future in pending:
                    if future.done():
                        future.result()  # a reward that fails stops the rollout
                index = slice(start, start + tools.policy.micro_batch)
                some = batch.take(index)
                latents, fields = self.rollout(some, replace(tools, draws=tools.draws.take(index)))
                pending.append(tools.judge.submit(latents, some))
                parts.append(fields)
            verdict = Verdict.cat([future.result() for future in pending])
        finally:
            for future in pending:
                future.cancel()  # nobody waits for what is not scored yet, where something failed
        fields = {name: torch.cat([p.pop(name) for p in parts]) for name in list(parts[0])}
        rewards, details = (
            {name: tools.world.gather(values) for name, values in part.items()}
            for part in (verdict.rewards, verdict.details)
        )
        group, weights = tools.world.gather(batch.group.cpu()), tools.judge.weights
        advantage = mixed_advantages(
            rewards, weights, group, global_std=self.global_std, mixing=self.reward_mixing
        )
        clipped = advantage.clamp(-self.adv_clip_max, self.adv_clip_max).float()
        per_sample, kept = fields["prompt_index"].shape[1], self.kept(clipped).float()

        def each(values: Tensor) -> Tensor:
            own = tools.world.local(values).to(batch.prompt_index.device)
            return own[:, None].expand(-1, per_sample)

        fields |= {
            "advantage": each(clipped),
            "sample_index": batch.sample_index[:, None].expand(-1, per_sample),
        }
        flat = {name: fields.pop(name).flatten(0, 1) for name in list(fields)}
        items = Items(each(kept).flatten(), flat, batch.conditions)
        total = weighted(rewards, weights)
        metrics = {
            "reward": total.mean(),
            "reward_std": total.std(correction=0),
            "reward_group_std": mean_group_std(total, group),
            "groups_without_spread": 1 - has_spread(total, group).double().mean(),
            "samples_trained": kept.mean(),
            "advantages": advantage,
            "item_bytes": torch.tensor(float(items.nbytes)),
        }
        metrics |= {f"reward/{name}": values.mean() for name, values in {**rewards, **details}.items()}
        return replace(items, metrics=metrics)
