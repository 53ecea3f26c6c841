"""SFT at SOAR's own noise levels: the same sigmas and weights, without the correction."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms._flow_matching import FlowMatching
from posttrain.algorithms.soar import auxiliary_point
from posttrain.flow import interpolate


class SamePoints(FlowMatching):
    """SOAR whose step ends where the data are, on the line from the image to the noise.

    So an auxiliary point lies on that line too, and its target is noise - image, as for SFT. The draws are
    SOAR's, and with them sigmas and weights. ``collect`` computes no velocity.
    """

    type: Literal["same_points"] = "same_points"

    lambda_aux: float = Field(default=1.0, ge=0)
    """As SOAR's."""
    trajectory_length: int = Field(default=6, ge=1)
    """As SOAR's."""
    num_sampling_steps: int = Field(default=40, ge=1)
    """As SOAR's."""
    sigma_floor: float = Field(default=0.02, ge=0, lt=1)
    """As SOAR's."""

    def collect(self, batch: Batch, tools: Tools) -> Items:
        base, noise, t0 = self.base_items(batch, tools)
        t1 = (t0 - 1 / self.num_sampling_steps).clamp(min=0)
        sigma1 = tools.policy.model.sigma(t1, batch.latents.shape[-2:])
        start, parts = interpolate(batch.latents, noise, sigma1), [base]
        for fraction in tools.draws.uniform("fractions.0", (self.trajectory_length,)).unbind(1):
            point = auxiliary_point(batch.latents, noise, start, sigma1, fraction, self.sigma_floor)
            fields = dict(zip(("latents", "sigma", "target"), point, strict=True))
            fields |= {"prompt_index": base.prompt_index, "sample_index": base.sample_index}
            parts.append(Items(self.lambda_aux * base.weight, fields, batch.conditions))
        return Items.cat(parts)
