"""Measures exposure bias: the error of the predicted image where the model leads, and where the data are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from posttrain.flow import expand, interpolate, predicted_x0
from posttrain.model import FlowModel
from posttrain.policy import Policy
from posttrain.sampling.prompts import encode
from posttrain.support.randomness import generator


def errors(
    policy: Policy,
    latents: Tensor,
    captions: Sequence[str],
    *,
    sigmas: Sequence[float],
    steps: int,
    guidance: float,
    seed: int = 0,
) -> list[dict[str, float]]:
    """For each sigma of the sampling grid the mean squared error of the predicted image, at two states.

    ``latents`` (n, c, h, w) are those of held-out images; the predicted ones are state - sigma v, with the
    velocity v without guidance. *data*: states on the line from an image to noise. *model*: those to which
    ``steps`` Euler steps of the model with ``guidance`` lead from such a state at a higher sigma, which the
    same image should explain. In both, the error is sigma^2 times that of the velocity that leads to the
    image. ``sigmas`` fall from 1 to 0.
    """
    noise = torch.randn(latents.shape, generator=generator(seed, "exposure bias")).to(latents)
    conditions, prompt = encode(policy.model, list(captions))
    condition = conditions.rows(prompt)

    def error(state: Tensor, sigma: Tensor) -> float:
        v = policy.velocity(state, sigma, condition)
        return (predicted_x0(state, v, sigma) - latents).square().mean().item()

    found = []
    with torch.no_grad():
        for j in range(steps, len(sigmas) - 1):
            path = [torch.full((len(latents),), s, device=latents.device) for s in sigmas[j - steps : j + 1]]
            state = interpolate(latents, noise, path[0])
            for s, s_next in pairwise(path):
                v = policy.guided_velocity(state, s, prompt, conditions, guidance)
                state = state + expand(s_next - s, state) * v
            s = path[-1]
            of_data = error(interpolate(latents, noise, s), s)
            found.append({"sigma": sigmas[j], "data": of_data, "model": error(state, s)})
    return found


def held_out(model: FlowModel, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Latents and captions of ``count`` clean Shapes scenes; ``seed`` is not one of a training set."""
    import numpy as np

    from posttrain.shapes.dataset import scene_at
    from posttrain.shapes.render import render

    scenes = [scene_at(seed=seed, index=i) for i in range(count)]
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    pixels = pixels.permute(0, 3, 1, 2).float().to(model.device) / 127.5 - 1
    with torch.no_grad():
        mean, logvar = model.posterior(pixels)
        return model.latents(mean, logvar, torch.zeros_like(mean)), [scene.caption for scene in scenes]
