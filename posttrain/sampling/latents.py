"""Samples latents and images from a policy, from noise that belongs to each prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.condition import Conditions
from posttrain.flow.solvers import Solver, solve
from posttrain.policy.out_of_memory import halve_until_it_fits
from posttrain.policy.policy import Policy
from posttrain.sampling.prompts import encode
from posttrain.support.randomness import generator


def prompt_noise(seed: int, prompt: str, index: int, shape: Sequence[int]) -> Tensor:
    """The initial noise, of ``shape`` (c, h, w), of a prompt's ``index``-th image.

    It depends on nothing else, so every model, batch size and number of processes starts from the same
    noise."""
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
    """Clean latents (n, c, h, w), solved from ``noise`` (n, c, h, w) without gradients by the policy's role
    in use.

    ``prompt`` (n,) holds the samples' rows in ``conditions``; ``sigmas`` fall from 1 to 0."""

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
    """Images (n, 3, resolution, resolution) in [0, 1]: the ``indices[i]``-th image of each ``prompts[i]``.

    Halves the micro-batch if memory runs out. Raises TrainingError if memory does not suffice for one row.
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
