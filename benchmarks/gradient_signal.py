"""Measures how far the gradients of independent batches agree: the signal a stage starts with, and its price.

python benchmarks/gradient_signal.py shapes-grpo [16 batches] [stages.grpo.algorithm.noise_level=1.0 ...]

The cosine of two batches' gradients is signal / (signal + noise) on average, signal being the squared norm of
the true gradient and noise the variance of one batch's, summed over the weights. Its error is that of leaving
out one batch at a time. Noise falls with the number of images, so one number says what a setting needs.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from posttrain.algorithm import Tools
from posttrain.algorithms._online import Online
from posttrain.data.family import Opening
from posttrain.engine.trainer import REFERENCE
from posttrain.policy import Policy
from posttrain.policy.precision import AUTOCAST
from posttrain.recipe.file import load_recipe
from posttrain.scoring.judge import Judge


def gradients(recipe_name: str, count: int, overrides: list[str]) -> tuple[Tensor, int, float, float]:
    """Gradients (batches, weights); images in a batch; forward-equivalents an image; spread in a group."""
    recipe = load_recipe(recipe_name, overrides)
    stage = recipe.stages[0]
    algorithm, settings = stage.algorithm, stage.train
    assert isinstance(algorithm, Online), "only what is rewarded is measured"
    model = recipe.model.load(torch.device("cpu"), "fp32")
    stage.tune.apply(model.transformer, recipe.seed)
    rows = settings.micro_batch if isinstance(settings.micro_batch, int) else 8
    policy = Policy(model, autocast=AUTOCAST[settings.precision], micro_batch=rows)
    for role in algorithm.roles:
        policy.add_role(role, moves=role != REFERENCE)
    found, spreads = [], []
    with tempfile.TemporaryDirectory() as work, Judge(model, stage.rewards, Path(work)) as judge:
        groups = (settings.batch_size, algorithm.samples_per_prompt)
        source = stage.data.open(Opening(model, Path(work), *groups, stage.rewards))
        sigmas = functools.partial(model.sigmas, height=source.size[0], width=source.size[1])
        for number, batch, draws in source.batches((recipe.seed, 0), 0):
            if number == count:
                break
            with torch.no_grad():
                items = algorithm.collect(batch, Tools(policy, draws, sigmas, judge))
            items = items.take(items.weight > 0)
            model.transformer.zero_grad(set_to_none=True)
            for micro in items.split(rows):
                share = micro.weight / items.weight.sum()
                (algorithm.loss(micro, policy).per_item * share).sum().backward()
            # weights without a gradient yet, like A beside LoRA's B = 0, have no direction
            parts = [p.grad.flatten() for p in policy.trained.values() if p.grad is not None]
            found.append(torch.cat(parts))
            spreads.append(items.metrics["reward_group_std"].item())
            print(f"{number + 1}/{count}", end="\r", file=sys.stderr)
    cost = policy.forward_equivalents / (count * settings.batch_size)
    return torch.stack(found).double(), settings.batch_size, cost, sum(spreads) / count


def cosine(gram: Tensor) -> float:
    """Signal / (signal + noise), from the inner products (n, n) of independent gradients."""
    n, energy = len(gram), gram.diagonal().mean()
    return (((gram.sum() - gram.trace()) / (n * (n - 1))) / energy).item()


def main(recipe: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    count = next((int(a) for a in arguments if a.isdigit()), 16)
    found, size, cost, spread = gradients(recipe, count, [a for a in arguments if "=" in a])
    gram = found @ found.T
    value = cosine(gram)
    without = [cosine(gram[keep][:, keep]) for keep in (torch.arange(count) != i for i in range(count))]
    mean = sum(without) / count
    error = ((count - 1) / count * sum((w - mean) ** 2 for w in without)) ** 0.5
    ratio = value / (1 - value)  # |E g|^2 / var, of a batch
    print(f"cosine of two batches of {size}: {value:+.4f} +- {error:.4f}; spread in a group {spread:.3f}")
    print(f"signal / noise, an image: {ratio / size:.2e} +- {error / size:.1e}")
    print(f"forward-equivalents, an image: {cost:.1f}; a batch: {cost * size:,.0f}")
    if ratio > 0:
        # the mean of m images has cosine^2 = signal / (signal + noise / m) with the true gradient
        images = size / ratio / 3
        price = f"{images:,.0f}, or {images * cost:,.0f} forward-equivalents"
        print(f"images until the cosine with the true gradient is 0.5: {price}")


if __name__ == "__main__":
    main(*sys.argv[1:])
