"""How are images drawn from a policy: noise, grid, solver, guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.condition import Conditions
from posttrain.flow.solvers import Solver, solve
from posttrain.model import FlowModel, Model, Sampler
from posttrain.policy.out_of_memory import halve_until_it_fits
from posttrain.policy.policy import Policy
from posttrain.support.randomness import generator
from posttrain.weights.files import hash_of

if TYPE_CHECKING:
    from posttrain.flow.sampling_settings import Sampling


def encode(model: FlowModel, prompts: Sequence[str]) -> tuple[Conditions, Tensor]:
    """The conditions of ``prompts``, each distinct one encoded once, or read from the model's cache, and each
    prompt's row (n,)."""
    distinct = list(dict.fromkeys(prompts))
    source = model.encode_prompts if model.prompt_cache is None else model.prompt_cache.conditions
    encoded = source(["", *distinct])
    row = {prompt: i + 1 for i, prompt in enumerate(distinct)}
    rows = torch.tensor([row[p] for p in prompts], device=model.device)
    return Conditions(encoded), rows


def prompt_noise(seed: int, prompt: str, index: int, shape: Sequence[int]) -> Tensor:
    """The initial latents (c, h, w) of a prompt's ``index``-th image: they belong to the prompt, so every
    model, batch size and number of processes starts it from the same noise."""
    return torch.randn(tuple(shape), generator=generator(seed, "evaluation", prompt, index))


def sample_latents(
    policy: Policy,
    conditions: Conditions,
    prompt: Tensor,
    noise: Tensor,
    sigmas: list[float],
    guidance: float,
    solver: Solver,
) -> Tensor:
    """Clean latents (n, c, h, w) from ``noise``, by the policy's role in use, without gradients."""

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        at = torch.full((len(latents),), sigma, device=latents.device)
        return policy.guided_velocity(latents, at, prompt, conditions, guidance)

    with torch.no_grad(), policy.casts_kept():
        return solve(velocity, noise, sigmas, solver)


def sample_images(
    policy: Policy,
    prompts: Sequence[str],
    indices: Sequence[int],
    *,
    resolution: int,
    steps: int,
    guidance: float,
    solver: Solver = "euler",
    seed: int = 0,
) -> Tensor:
    """Images (n, 3, resolution, resolution) in [0, 1]: the ``indices[i]``-th image of ``prompts[i]``.

    In smaller chunks where memory does not suffice; raises TrainingError where it does not for one.
    """
    model = policy.model
    conditions, rows = encode(model, prompts)
    shape = model.latent_shape(resolution, resolution)
    pairs = zip(prompts, indices, strict=True)
    noise = torch.stack([prompt_noise(seed, p, i, shape) for p, i in pairs]).to(model.device)
    sigmas = model.sigmas(steps, resolution, resolution)

    def drawn() -> Tensor:
        return model.decode(sample_latents(policy, conditions, rows, noise, sigmas, guidance, solver))

    return halve_until_it_fits(drawn, policy, lambda: not policy.layout.sharded)


class FlowSampler(Sampler):
    """Samples a :class:`FlowModel` by the policy's role in use; what it costs is not the policy's."""

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
    """A sampler of ``model``, which ``spec`` loaded, as it is, in the precision that ``settings`` ask for."""
    autocast = None if settings.precision == "fp32" else torch.bfloat16
    if autocast is not None:
        # of others autocast keeps nothing; images are drawn without gradients all the same
        model.transformer.requires_grad_(True)
    return FlowSampler(Policy(model, autocast=autocast), source, spec.described())


def sampler_of(spec: Model, device: torch.device, settings: Sampling) -> Sampler:
    """What draws images with the weights that ``spec`` names: a sampler of its own, or the loaded model.

    Raises ModelError as :meth:`Model.load`.
    """
    if (own := spec.sampler(device, settings)) is not None:
        return own
    source = spec.model_dump(mode="json").get("path", spec.type)
    return flow_sampler(spec.load(device, "fp32"), spec, settings, source)
