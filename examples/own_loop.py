"""Trains the tiny model by SOAR in a loop of one's own: the algorithm, a model and plain torch.

``posttrain run`` adds to this loop what a long run needs: micro-batches, processes, checkpoints, records,
evaluations. Run it from anywhere: ``python examples/own_loop.py``.
"""

from __future__ import annotations

import numpy as np
import torch

from posttrain.algorithm import Batch, Tools
from posttrain.algorithms.soar import SOAR
from posttrain.models.sd3 import SD3
from posttrain.policy import Policy
from posttrain.sampling.prompts import encode
from posttrain.shapes.dataset import scene_at
from posttrain.shapes.render import render
from posttrain.support.randomness import Draws


def train(steps: int = 20, batch_size: int = 8) -> list[float]:
    """The loss of each step."""
    model = SD3(path="posttrain/tiny-sd3", max_sequence_length=16).load(torch.device("cpu"), "fp32")
    model.transformer.requires_grad_(True)
    policy, algorithm = Policy(model), SOAR(trajectory_length=2)
    optimizer = torch.optim.AdamW(policy.trained.values(), lr=2e-4)
    history = []
    for step in range(steps):
        ids = range(step * batch_size, (step + 1) * batch_size)
        scenes = [scene_at(seed=0, index=i) for i in ids]
        pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
        draws = Draws(("my run", step), ids)  # every random number: a function of this key and the sample
        with torch.no_grad():
            pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (n, 3, h, w) in [-1, 1]
            noise = draws.normal("posterior", model.latent_shape(*pixels.shape[2:]))
            conditions, rows = encode(model, [scene.caption for scene in scenes])
            batch = Batch(model.encode_images(pixels, noise), rows, conditions)
            items = algorithm.collect(batch, Tools(policy, draws))
        losses = algorithm.loss(items, policy).per_item
        loss = (items.weight * losses).sum() / items.weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


if __name__ == "__main__":
    for step, loss in enumerate(train()):
        print(f"step {step}  loss {loss:.4f}")
