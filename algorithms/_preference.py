"""Diffusion-DPO's loss on pairs of images: the base class of DPO and online DPO (arXiv:2311.12908)."""

from __future__ import annotations

from abc import ABC
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms._flow_matching import FlowMatching, loss_weight
from posttrain.condition import Condition
from posttrain.flow import interpolate
from posttrain.policy import Policy


class Preference(FlowMatching, ABC):
    """Regress the velocity better at chosen images than at rejected ones, as compared with the reference.

    Items, one for each pair at a time t: latents, target, rejected_latents, rejected_target (n, c, h, w);
    sigma, reference_loss, rejected_reference_loss, prompt_index, sample_index (n,). Both images of a pair
    have one noise and one sigma, so that the difference of their losses is the images' own.
    """

    beta: float = Field(default=2000.0, gt=0)
    """Strength of the pull to the reference: the greater, the less a pair moves the policy (section 4.1)."""

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({"reference"})

    def pair_items(self, pairs: Batch, tools: Tools) -> Items:
        """One item for each pair: ``pairs.latents`` was preferred to ``fields["rejected"]``.

        An item's weight is that of its pair: the column ``weight`` of its row, 1 by default.
        """
        base, noise, _ = self.base_items(pairs, tools)
        rejected = pairs.fields["rejected"]
        fields = {
            **base.fields,
            "rejected_latents": interpolate(rejected, noise, base.sigma),
            "rejected_target": noise - rejected,
        }
        return self.with_reference(replace(base, fields=fields), tools.policy)

    def with_reference(self, items: Items, policy: Policy) -> Items:
        """``items`` with the reference's losses, which training does not change."""
        with policy.using("reference"):
            # in the loss's micro-batches, so that equal weights give equal losses to the bit
            parts = [self.losses(part, policy, repeated=True) for part in items.split(policy.micro_batch)]
        chosen, rejected = (torch.cat(column) for column in zip(*parts, strict=True))
        names = {"reference_loss": chosen, "rejected_reference_loss": rejected}
        return replace(items, fields={**items.fields, **names})

    def losses(self, items: Items, policy: Policy, *, repeated: bool = False) -> tuple[Tensor, Tensor]:
        """The velocity's loss (n,) at the chosen images, and at the rejected ones, by one forward."""
        latents = torch.cat([items.latents, items.rejected_latents])
        target = torch.cat([items.target, items.rejected_target])
        prompt, sigma = torch.cat([items.prompt_index] * 2), torch.cat([items.sigma] * 2)
        v = policy.velocity(latents, sigma, self.condition(items, prompt, policy), repeated=repeated)
        error = (v - target).square().flatten(1).mean(1)
        chosen, rejected = (loss_weight(self.weighting_scheme, sigma) * error).chunk(2)
        return chosen, rejected

    def condition(self, items: Items, prompt: Tensor, policy: Policy) -> Condition:
        """The condition of each row of ``prompt`` (n,) at which the losses are taken."""
        del policy
        return items.conditions.rows(prompt)

    def loss(self, items: Items, policy: Policy) -> Losses:
        chosen, rejected = self.losses(items, policy)
        gained = (chosen - items.reference_loss) - (rejected - items.rejected_reference_loss)
        margin = -0.5 * self.beta * gained
        metrics = {
            "margin": margin,
            "accuracy": (margin > 0).float(),
            "chosen_loss": chosen,
            "rejected_loss": rejected,
        }
        return Losses(-logsigmoid(margin), metrics)
