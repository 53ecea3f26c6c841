"""Gives evaluations a sampler of a loaded model, or of the weights that a recipe's model block names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.model import FlowModel, Model, loaded_if_fit, torch_dtype
from posttrain.policy.policy import Policy
from posttrain.sampler import Sampler
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
    """A sampler of ``model``, which ``spec`` loaded from ``source``. The transformer's weights are lowered to
    the precision of ``settings``, as a rollout in training has them.

    Raises ModelError if the model cannot make images of that size.
    """
    model.latent_shape(settings.resolution, settings.resolution)
    _lower(model.transformer, torch_dtype(settings.precision))
    return FlowSampler(Policy(model), source, spec.card_settings())


def _lower(transformer: Any, dtype: torch.dtype) -> None:
    """Cast the weights to ``dtype``, but those that diffusers keeps in float32 for accuracy."""
    kept = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def loaded_to_draw(
    spec: Model, device: torch.device, settings: Sampling, sources: Sequence[Path] = ()
) -> FlowModel:
    """The model that ``spec`` names, with the weights of each of ``sources``, as ``settings`` draw with it.

    In float32 adapters are merged. In lower precision they stay beside the weights, whose rounding would
    swallow small ones. Raises ModelError as :meth:`Model.load` and :meth:`FlowModel.load_weights` do.
    """
    model = loaded_if_fit(spec, device, settings.precision)
    for source in sources:
        model.load_weights(source, merge=settings.precision == "fp32")
    return model


def sampler_of(spec: Model, device: torch.device, settings: Sampling) -> Sampler:
    """The sampler of the weights that ``spec`` names: the model's own sampler, or one of the loaded model.

    Raises ModelError as :meth:`Model.load` does.
    """
    if (sampler := spec.sampler(device, settings)) is not None:
        return sampler
    source = spec.model_dump(mode="json").get("path", spec.type)
    return flow_sampler(loaded_to_draw(spec, device, settings), spec, settings, source)
