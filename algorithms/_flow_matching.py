"""Velocity regression at noisy latents of a random sigma: the base class of SFT, SOAR, ReflexFlow and DPO."""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Items, Losses, Tools
from posttrain.algorithms._unused import used
from posttrain.condition import EMPTY_PROMPT
from posttrain.flow import interpolate
from posttrain.policy import Policy

WeightingScheme = Literal["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"]


class FlowMatching(Algorithm, ABC):
    """Velocity regression (Lipman et al. 2022, arXiv:2210.02747).

    Items: latents (n, c, h, w), sigma (n,), target (n, c, h, w), prompt_index (n,), sample_index (n,).
    """

    needs: ClassVar = "images"

    weighting_scheme: WeightingScheme = "logit_normal"
    """The density of t and the loss's weight at sigma (arXiv:2403.03206, section 3.1). ``logit_normal`` and
    ``mode`` are densities, with weight 1; ``sigma_sqrt`` and ``cosmap`` are weights, with t uniform; ``none``
    is weight 1 with t uniform."""
    logit_mean: float = 0.0
    """The mean of logit(t) under ``logit_normal``. t = 1 is noise, so a greater mean is noisier; in
    diffusers' DreamBooth scripts t = 0 is noise and the mean has the opposite sign."""
    logit_std: float = Field(default=1.0, gt=0)
    """The standard deviation of logit(t) under ``logit_normal``, greater than 0. A greater one draws more
    times near 0 and 1."""
    mode_scale: float = Field(default=1.29, ge=-1, le=2 / (math.pi - 2))
    """The scale s of the ``mode`` density (arXiv:2403.03206, section 3.1), within the paper's range of -1 to
    2 / (pi - 2) = 1.75. A greater one draws more times in the middle."""
    cond_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability that a sample is trained on the empty prompt, drawn for each sample."""

    @model_validator(mode="after")
    def _every_option_is_used(self) -> Self:
        scheme = self.weighting_scheme
        other = f"with the weighting_scheme {scheme!r}"
        not_normal, not_mode = scheme != "logit_normal" and other, scheme != "mode" and other
        return used(self, {"logit_mean": not_normal, "logit_std": not_normal, "mode_scale": not_mode})

    def loss(self, items: Items, policy: Policy) -> Losses:
        v = policy.velocity(items.latents, items.sigma, items.condition)
        error = (v - items.target).square().flatten(1).mean(1)
        return Losses(loss_weight(self.weighting_scheme, items.sigma) * error)

    def base_items(self, batch: Batch, tools: Tools) -> tuple[Items, Tensor, Tensor]:
        """One item for each sample at a random t; also the noise (n, c, h, w) and t (n,).

        An item's weight is that of its image: the column ``weight`` of its row, 1 by default.
        """
        noise = tools.draws.normal("noise", batch.latents.shape[1:])
        t = self.density(tools)
        sigma = tools.policy.model.sigma(t, batch.latents.shape[-2:])
        dropped = tools.draws.uniform("cond_dropout") < self.cond_dropout
        fields = {
            "latents": interpolate(batch.latents, noise, sigma),
            "sigma": sigma,
            "target": noise - batch.latents,
            "prompt_index": torch.where(dropped, EMPTY_PROMPT, batch.prompt_index),
            "sample_index": batch.sample_index,
        }
        weights = [row.get("weight", 1.0) for row in batch.metadata] or [1.0] * len(batch)
        return Items(torch.tensor(weights).to(sigma), fields, batch.conditions), noise, t

    def density(self, tools: Tools) -> Tensor:
        """One random time t for each sample, (n,) in [0, 1]."""
        if self.weighting_scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * tools.draws.normal("timestep", ()))
        u = tools.draws.uniform("timestep")
        if self.weighting_scheme == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u


def loss_weight(scheme: WeightingScheme, sigma: Tensor) -> Tensor:
    """The loss's weight at ``sigma`` (n,) (arXiv:2403.03206, section 3.1).

    ``sigma_sqrt``: sigma^-2. ``cosmap``: 2 / (pi (1 - 2 sigma + 2 sigma^2)). All other schemes: 1.
    """
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)
