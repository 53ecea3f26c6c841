"""Measures exposure bias: the error of the velocity where the model's own steps lead, and where the data are.

An image x0, noise n and a start at sigma_a give the state x_a = (1 - sigma_a) x0 + sigma_a n. Three errors of
the predicted image D(x, sigma) = x - sigma v(x, sigma) belong to it, each the mean over the latents of
(D - x0)^2, which is sigma^2 times the squared error of the velocity:

- *data*, at a state on the line. The velocity's target is n - x0 = (x - x0) / sigma.
- *model*, at x_b, to which steps of the model lead from x_a. There n - x0 is no longer the target: it
  would lead beside the image by x_b's distance from the line. The velocity that leads to x0 is
  (x_b - x0) / sigma_b.
- *excess*: model at sigma_b minus data at sigma_a.

The *model* error may not be compared with that of *data* at the same sigma_b. A state on the line there holds
more of x0 than x_b does, which follows from x_a alone: even the exact velocity, which has no exposure bias,
errs more at x_b. The error at x_a is the one to compare with. In both, x0 is known through x_a only, so its
remaining variance is the same and drops out of *excess*: what is left is how much worse the model explains
the image after its own steps. With the exact velocity that is E |D(x_b) - D(x_a)|^2, of second order in the
step. *Model* errors of two models compare likewise, since both start at the same x_a.

States that a whole rollout visits from pure noise have no such error: no image belongs to them, and the
velocity that would be right there, E[n - x0 | x, caption] under the data, is not known in this world.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

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
    rollouts: Sequence[tuple[int, float]],
    seed: int = 0,
) -> dict[str, Any]:
    """The errors of each image at each sigma of the sampling grid ``sigmas``, which fall from 1 to 0.

    ``latents`` (n, c, h, w) are those of held-out images. ``rollouts`` are numbers of Euler steps, each odd,
    with their guidance; errors are those of the velocity without guidance. Returns ``sigmas`` without the
    last, ``data`` with n errors for each, and for each rollout "STEPS-GUIDANCE" ``ends``, every second index
    into ``sigmas``, and ``model`` with n errors for each end.
    """
    noise = torch.randn(latents.shape, generator=generator(seed, "exposure bias")).to(latents)
    conditions, prompt = encode(policy.model, list(captions))
    condition = conditions.rows(prompt)

    def on_line(sigma: float) -> Tensor:
        return interpolate(latents, noise, at(sigma))

    def at(sigma: float) -> Tensor:
        return torch.full((len(latents),), sigma, device=latents.device)

    def error(state: Tensor, sigma: float) -> list[float]:
        v = policy.velocity(state, at(sigma), condition)
        each = (predicted_x0(state, v, at(sigma)) - latents).square().flatten(1).mean(1)
        return [float(f"{value:.4g}") for value in each.tolist()]

    def led(first: int, end: int, guidance: float) -> Tensor:
        state = on_line(sigmas[first])
        for s, s_next in pairwise(sigmas[first : end + 1]):
            v = policy.guided_velocity(state, at(s), prompt, conditions, guidance)
            state = state + expand(at(s_next - s), state) * v
        return state

    with torch.no_grad():
        found: dict[str, Any] = {"sigmas": list(sigmas[:-1])}
        found["data"] = [error(on_line(s), s) for s in sigmas[:-1]]
        for steps, guidance in rollouts:
            ends = list(range(steps, len(sigmas) - 1, 2))
            model = [error(led(end - steps, end, guidance), sigmas[end]) for end in ends]
            found[rollout_name(steps, guidance)] = {"steps": steps, "ends": ends, "model": model}
    return found


def rollout_name(steps: int, guidance: float) -> str:
    """The key of a rollout in what :func:`errors` returns."""
    return f"{steps}-{guidance:g}"


def held_out(model: FlowModel, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Latents and captions of ``count`` clean Shapes scenes, from JPEG as those of a data set; ``seed`` is
    not one of a training set."""
    import numpy as np
    from PIL import Image

    from posttrain.shapes.dataset import jpeg, scene_at

    scenes = [scene_at(seed=seed, index=i) for i in range(count)]
    images = [np.asarray(Image.open(io.BytesIO(jpeg(scene))).convert("RGB")) for scene in scenes]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().to(model.device) / 127.5 - 1
    with torch.no_grad():
        mean, logvar = model.posterior(pixels)
        return model.latents(mean, logvar, torch.zeros_like(mean)), [scene.caption for scene in scenes]
