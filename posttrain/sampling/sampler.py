"""Gives evaluations a sampler of a loaded model, or of the weights that a recipe's model block names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.model import FlowModel, Model, Sampler
from posttrain.policy.policy import Policy
from posttrain.policy.precision import AUTOCAST
from posttrain.sampling.latents import sample_images
from posttrain.weights.files import hash_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.flow.sampling_settings import Sampling


class FlowSampler(Sampler):
    """Samples a :class:`FlowModel` with the policy's role in use. It counts its own forwards, apart from the
    policy's."""

    def __init__(self, policy: Policy, source: str = "", settings: Mapping[str, Any] | None = None) -> None:
        self.policy, self.source, self.settings = policy, source, settings or {}
        self.device, self.divisor = policy.model.device, policy.model.divisor
        self.forward_equivalents = 0

    def images(self, prompts: Sequence[str], indices: Sequence[int], settings: Sampling) -> Tensor:
        spent = self.policy.forward_equivalents
        images = sample_images(
            self.policy,
            prompts,
            indices,
            resolution=settings.resolution,
            steps=settings.steps,
            guidance=settings.guidance,
            solver=settings.solver,
            seed=settings.seed,
        )
        self.forward_equivalents += self.policy.forward_equivalents - spent
        self.policy.forward_equivalents = spent
        return images

    def fingerprint(self) -> str:
        return hash_of(self.policy.parameters)


def flow_sampler(model: FlowModel, spec: Model, settings: Sampling, source: str) -> FlowSampler:
    """A sampler of ``model``, which ``spec`` loaded from ``source``, in the precision of ``settings``."""
    autocast = AUTOCAST[settings.precision]
    if autocast is not None:
        # autocast keeps low-precision copies only of weights that require gradients; sampling computes none
        model.transformer.requires_grad_(True)
    return FlowSampler(Policy(model, autocast=autocast), source, spec.card_settings())


def sampler_of(spec: Model, device: torch.device, settings: Sampling) -> Sampler:
    """The sampler of the weights that ``spec`` names: the model's own sampler, or one of the loaded model.

    Raises ModelError as :meth:`Model.load` does.
    """
    if (sampler := spec.sampler(device, settings)) is not None:
        return sampler
    source = spec.model_dump(mode="json").get("path", spec.type)
    return flow_sampler(spec.load(device, "fp32"), spec, settings, source)
