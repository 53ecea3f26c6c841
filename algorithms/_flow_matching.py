"""What SFT and SOAR share: noisy latents at a random sigma, and the weighted velocity error there."""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Items, Losses, Tools
from posttrain.condition import EMPTY_PROMPT
from posttrain.flow import interpolate, shift_sigma
from posttrain.policy import Policy

WeightingScheme = Literal["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"]


class FlowMatching(Algorithm, ABC):
    """Velocity regression (Lipman et al. 2022, arXiv:2210.02747).

    Items: latents (n, c, h, w), sigma (n,), target (n, c, h, w), prompt, place (n,).
    """

    needs: ClassVar = "images"

    weighting_scheme: WeightingScheme = "logit_normal"
    """How t is drawn and the loss weighted (arXiv:2403.03206, section 3.1): ``logit_normal`` and ``mode``
    draw t so; the others draw it uniformly, and ``sigma_sqrt`` and ``cosmap`` weight the loss."""
    logit_mean: float = 0.0
    """Of the logit-normal density of t, t = 1 being noise: greater means noisier. (diffusers' DreamBooth
    scripts count from the other end; their mean has the opposite sign.)"""
    logit_std: float = Field(1.0, gt=0)
    mode_scale: float = 1.29
    """Of the ``mode`` density."""
    cond_dropout: float = Field(0.0, ge=0, le=1)
    """Chance that a sample is trained on the empty prompt, drawn for each sample."""

    def loss(self, items: Items, policy: Policy) -> Losses:
        v = policy.velocity(items.latents, items.sigma, items.condition)
        error = (v - items.target).square().flatten(1).mean(1)
        return Losses(loss_weight(self.weighting_scheme, items.sigma) * error)

    def base_items(self, batch: Batch, tools: Tools) -> tuple[Items, Tensor, Tensor]:
        """One item per sample at a random t; also the noise (n, c, h, w) and t (n,)."""
        noise = tools.draws.normal("noise", batch.latents.shape[1:])
        t = self.density(tools)
        sigma = shift_sigma(t, tools.policy.model.shift)
        dropped = tools.draws.uniform("cond_dropout") < self.cond_dropout
        fields = {
            "latents": interpolate(batch.latents, noise, sigma),
            "sigma": sigma,
            "target": noise - batch.latents,
            "prompt_index": torch.where(dropped, EMPTY_PROMPT, batch.prompt_index),
            "sample_index": batch.sample_index,
        }
        return Items(torch.ones_like(sigma), fields, batch.conditions), noise, t

    def density(self, tools: Tools) -> Tensor:
        """The times t (n,) in [0, 1] at which a batch is trained."""
        if self.weighting_scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * tools.draws.normal("timestep", ()))
        u = tools.draws.uniform("timestep")
        if self.weighting_scheme == "mode":
            return 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u


def loss_weight(scheme: WeightingScheme, sigma: Tensor) -> Tensor:
    """The factor on the loss at ``sigma`` (n,): sigma^-2, 2 / (pi (1 - 2 sigma + 2 sigma^2)), or 1."""
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)
