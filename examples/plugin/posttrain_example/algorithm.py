"""Flow matching with a scheduled pseudo-Huber loss, for images of which some are wrong."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from posttrain.algorithm import Algorithm, Batch, Items, Losses, Tools
from posttrain.flow import interpolate
from posttrain.policy import Policy


class ScheduledHuber(Algorithm):
    """Regress the velocity with a loss that forgives outliers at high noise (arXiv:2403.16728).

    The loss of an element's error e is 2 c (sqrt(e^2 + c^2) - c): e^2 where e is far below c, linear far
    above. c falls from 1 at sigma 0 to ``threshold`` at sigma 1, so details are learned by squares.
    """

    type: Literal["scheduled_huber"] = "scheduled_huber"
    needs: ClassVar = "images"

    threshold: float = Field(default=0.1, gt=0, le=1)
    """c at sigma 1, in (0, 1]. At sigma it is ``threshold`` to the power of sigma."""

    def collect(self, batch: Batch, tools: Tools) -> Items:
        noise = tools.draws.normal("noise", batch.latents.shape[1:])
        t = torch.sigmoid(tools.draws.normal("timestep", ()))
        sigma = tools.policy.model.sigma(t, batch.latents.shape[-2:])
        fields = {
            "latents": interpolate(batch.latents, noise, sigma),
            "sigma": sigma,
            "target": noise - batch.latents,
            "prompt_index": batch.prompt_index,
            "sample_index": batch.sample_index,
        }
        return Items(torch.ones_like(sigma), fields, batch.conditions)

    def loss(self, items: Items, policy: Policy) -> Losses:
        error = policy.velocity(items.latents, items.sigma, items.condition) - items.target
        c = (self.threshold**items.sigma).view(-1, 1, 1, 1)
        return Losses((2 * c * ((error.square() + c.square()).sqrt() - c)).flatten(1).mean(1))
