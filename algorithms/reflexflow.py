"""ReflexFlow: flow matching weighted by the exposure bias, and a pull back from where the model drifts to.

After Huang et al. 2025, arXiv:2512.04904. Of the paper only the abstract could be read. The equations and the
default weights are second-hand: SimpleTuner reports those of this paper, Arioso those of its successor, DEFAR
(arXiv:2606.28226). docs/algorithm-reflexflow.md says what each reports, and what could not be checked.

One Euler step of the model's velocity v leads from noisy latents x at sigma to *biased* latents at a smaller
sigma', beside the *clean* interpolation there. With x0 the image and target = noise - x0:

- bias = v(clean, sigma') - v(biased, sigma'), without gradients
- matching = mean of (1 + fc_alpha bias / sum |bias|) (v(x, sigma) - target)^2: frequency compensation (FC)
- drift = | unit(v(biased, sigma')) - unit(biased - x0) |^2: anti-drift rectification (ADR)
- loss = fc_weight matching + adr_weight drift
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms._flow_matching import FlowMatching, loss_weight
from posttrain.algorithms._unused import used
from posttrain.flow import expand, interpolate
from posttrain.policy import Policy


class ReflexFlow(FlowMatching):
    """Regress the velocity, weighted by the exposure bias, and turn it back to the image at biased latents.

    Items, one for each sample: those of SFT; with ``adr_weight`` also biased_latents and drift (n, c, h, w)
    and biased_sigma (n,); with ``fc_alpha`` also error_weight (n, c, h, w) and exposure_bias (n,).
    """

    type: Literal["reflexflow"] = "reflexflow"

    adr_weight: float = Field(default=10.0, ge=0)
    """Weight of anti-drift rectification, the paper's beta 1 by report. 0 is none."""
    fc_weight: float = Field(default=1.0, gt=0)
    """Weight of the regression, the paper's beta 2 by report. It cannot be 0: anti-drift rectification alone
    leaves a velocity's length open."""
    fc_alpha: float = Field(default=1.0, ge=0)
    """Strength of frequency compensation, the paper's alpha by report. 0 is none, and SFT if ``adr_weight``
    is 0 too. The weights of a sample's D numbers differ from 1 by alpha / D on average."""
    step_range: float = Field(default=1.0, gt=0, le=1)
    """Longest step, as a share of its time t. The step ends at a time drawn uniformly between
    (1 - step_range) t and t."""

    @model_validator(mode="after")
    def _a_step_is_taken(self) -> Self:
        is_sft = self.adr_weight == 0 and self.fc_alpha == 0
        return used(self, {"step_range": is_sft and "where adr_weight and fc_alpha are 0, as in SFT"})

    def collect(self, batch: Batch, tools: Tools) -> Items:
        base, noise, t = self.base_items(batch, tools)
        if self.adr_weight == 0 and self.fc_alpha == 0:
            return base

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            return tools.policy.guided_velocity(latents, sigma, base.prompt_index, batch.conditions, None)

        end = t * (1 - self.step_range * tools.draws.uniform("step"))
        sigma = tools.policy.model.sigma(end, batch.latents.shape[-2:])
        biased = base.latents + expand(sigma - base.sigma, noise) * velocity(base.latents, base.sigma)
        fields = dict(base.fields)
        if self.adr_weight:
            fields |= {"biased_latents": biased, "biased_sigma": sigma, "drift": biased - batch.latents}
        if self.fc_alpha:
            bias = velocity(interpolate(batch.latents, noise, sigma), sigma) - velocity(biased, sigma)
            fields["error_weight"] = compensation(bias, self.fc_alpha)
            fields["exposure_bias"] = bias.square().flatten(1).mean(1)
        return replace(base, fields=fields)

    def loss(self, items: Items, policy: Policy) -> Losses:
        latents, sigma, prompt = items.latents, items.sigma, items.prompt_index
        if self.adr_weight:
            latents = torch.cat([latents, items.biased_latents])
            sigma, prompt = torch.cat([sigma, items.biased_sigma]), torch.cat([prompt, prompt])
        v = policy.velocity(latents, sigma, items.conditions.rows(prompt))
        error, metrics = (v[: len(items)] - items.target).square(), {}
        if self.fc_alpha:
            error = items.error_weight * error
            metrics["exposure_bias"] = items.exposure_bias
        matching = loss_weight(self.weighting_scheme, items.sigma) * error.flatten(1).mean(1)
        if not self.adr_weight:
            return Losses(self.fc_weight * matching, metrics)
        drift = turned(v[len(items) :], items.drift)
        metrics |= {"matching_loss": matching, "drift_loss": drift}
        return Losses(self.fc_weight * matching + self.adr_weight * drift, metrics)


def compensation(bias: Tensor, alpha: float) -> Tensor:
    """The weight (n, c, h, w) of each squared error: 1 + alpha bias / sum |bias|, the sum over the sample.

    ``bias`` (n, c, h, w) is the velocity at clean latents minus that at biased ones. A sample without bias
    gets 1 everywhere. A weight is at least 0, or it would reward an error; that binds for alpha above 1 only.
    """
    total = bias.abs().sum(dim=tuple(range(1, bias.ndim)), keepdim=True)
    return (1 + alpha * bias / total.clamp(min=1e-12)).clamp(min=0)


def turned(v: Tensor, drift: Tensor) -> Tensor:
    """The squared distance (n,) of the unit vectors along ``v`` and ``drift``, both (n, c, h, w).

    It is 2 (1 - cosine of their angle), from 0 to 4, whatever their lengths. A vector of length 0 counts as
    itself.
    """
    return (normalize(v.flatten(1)) - normalize(drift.flatten(1))).square().sum(1)
