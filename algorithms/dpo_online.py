"""Online Diffusion-DPO: pairs made of the policy's own samples by their rewards (arXiv:2311.12908).

Of each group the best and the worst sample are a pair, as in Flow-GRPO's DPO (arXiv:2505.05470, section 5).
Three differences from its published code: samples come from the policy, not from a copy of it that is renewed
every 40 steps; their sampler is deterministic; and a group whose rewards are all equal gives no pair.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms._preference import Preference
from posttrain.algorithms._rollouts import Rollouts, reward_metrics
from posttrain.condition import Condition
from posttrain.errors import StepRefused
from posttrain.flow.advantages import weighted
from posttrain.flow.sampling_settings import GUIDANCE
from posttrain.flow.solvers import Solver
from posttrain.policy import Policy


class DPOOnline(Rollouts, Preference):
    """Learn from the best and the worst of ``group_size`` samples of a prompt."""

    type: Literal["dpo_online"] = "dpo_online"

    num_steps: int = Field(default=40, ge=2, le=10_000)
    """Sampling steps of the rollout."""
    solver: Solver = "euler"
    """Solver of the rollout."""
    guidance_scale: Annotated[float, GUIDANCE] = Field(default=4.5, ge=0)
    """Guidance of the rollout; 1 is none. Training has no classifier-free guidance. A model that takes the
    scale as an input (FLUX.1 dev) is trained at the same."""
    points_per_pair: int = Field(default=39, ge=1, le=1000)
    """Times at which a pair is trained, each with noise of its own."""
    beta: float = Field(default=100.0, gt=0)
    """Strength of the pull to the reference: the greater, the less a pair moves the policy."""

    def rollout(self, batch: Batch, tools: Tools) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = self.sampled(batch, tools, self.guidance_scale, self.solver)
        return x0, {"x0": x0}

    def condition(self, items: Items, prompt: Tensor, policy: Policy) -> Condition:
        return policy.condition(items.conditions, prompt, self.guidance_scale)

    def collect(self, batch: Batch, tools: Tools) -> Items:
        fields, verdict, group, weights = self.scored_by_all(batch, tools)
        reward = weighted(verdict.rewards, weights)
        if not reward.isfinite().all():  # each score is, but not their sum
            raise StepRefused("the weighted sum of the rewards")
        best, worst = extremes(reward, group)
        items = self._items(batch, fields["x0"], best, worst, tools)
        metrics = reward_metrics(verdict, weights, group)
        metrics |= {
            "pairs": torch.tensor(float(len(best))),
            "item_bytes": torch.tensor(float(items.nbytes)),
        }
        return replace(items, metrics=metrics)

    def _items(self, batch: Batch, x0: Tensor, best: Tensor, worst: Tensor, tools: Tools) -> Items:
        """The items of the pairs whose chosen sample is this process's, with fillers of weight 0: sharded
        weights need as many items in all processes, and at least one."""
        first, everybodys = len(batch) * tools.world.rank, tools.world.gather(x0)
        mine = (best >= first) & (best < first + len(batch))
        count = int(mine.sum())
        fillers = torch.zeros(max(tools.world.max(count), 1) - count, dtype=torch.int64)
        chosen, rejected = torch.cat([best[mine] - first, fillers]), torch.cat([worst[mine], fillers])
        is_pair = (torch.arange(len(chosen)) < count).to(x0.device)
        at, against = chosen.to(x0.device), rejected.to(x0.device)
        pairs = Batch(
            x0[at],
            batch.prompt_index[at],
            batch.conditions,
            sample_index=torch.where(is_pair, batch.sample_index.to(x0.device)[at], -1),
            fields={"rejected": everybodys[against]},
        )
        draws = tools.draws.of([tools.draws.ids[row] for row in chosen.tolist()])
        points = [
            self.pair_items(pairs, replace(tools, draws=replace(draws, key=(*draws.key, "point", i))))
            for i in range(self.points_per_pair)
        ]
        return replace(Items.cat(points), weight=is_pair.float().repeat(self.points_per_pair))


def extremes(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """The positions (g,) of the best and of the worst sample of each group whose rewards differ.

    ``reward`` (n,); samples with equal ``group`` (n,) form a group. Of equal samples it is the first.
    """
    best, worst = [], []
    for number in torch.unique(group).tolist():
        rows = torch.nonzero(group == number).flatten()
        scores = reward[rows]
        if scores.max() > scores.min():
            best.append(int(rows[scores.argmax()]))
            worst.append(int(rows[scores.argmin()]))
    return torch.tensor(best, dtype=torch.int64), torch.tensor(worst, dtype=torch.int64)
