"""A velocity model without a network folder: a small net on 2-D "latents", fast enough for laws."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from posttrain.algorithm import Batch
from posttrain.condition import Conditions
from posttrain.distributed.world import ALONE
from posttrain.model import FlowModel
from posttrain.parallel.single import Alone
from posttrain.policy import Policy
from posttrain.policy.layout import Layout
from posttrain.reward import Scores
from posttrain.sampling.prompts import encode
from posttrain.scoring.judge import Judge
from posttrain.support.randomness import Draws


class ToyModel(FlowModel):
    """Latents (n, 1, 2, 2); the condition is a vector of 3."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.transformer = nn.Sequential(nn.Linear(4 + 1 + 3, 32), nn.SiLU(), nn.Linear(32, 4))
        self.module = self.transformer
        self.device, self.shift, self.divisor = torch.device("cpu"), 3.0, 1

    def sigmas(self, steps, height, width):
        return torch.linspace(1, 0, steps + 1).tolist()

    def encode_prompts(self, prompts):
        return {"c": torch.stack([torch.tensor([len(p), p.count("a"), 1.0]) / 10 for p in prompts])}

    def posterior(self, pixels):
        return pixels, torch.full_like(pixels, -30.0)

    def latents(self, mean, logvar, noise):
        return mean

    def latent_shape(self, height, width):
        return (1, 2, 2)

    def decode(self, latents):
        return latents

    def velocity(self, latents, sigma, condition):
        features = torch.cat([latents.flatten(1), sigma[:, None], condition["c"]], 1)
        return self.module(features).view_as(latents)

    def save(self, folder, dtype, weights):
        raise AssertionError("not in these tests")

    save_lora = load_weights = save


def toy_batch(model, n=6, step=0, seed=0):
    prompts = [f"prompt {'a' * (i % 3)}" for i in range(n)]
    conditions = Conditions(model.encode_prompts(["", *prompts]))
    draws = Draws((seed, 0, step), range(n))
    latents = draws.normal("data", (1, 2, 2)) * 0.3 + 1
    return Batch(latents, torch.arange(1, n + 1), conditions), draws


def toy_policy(seed=0):
    return Policy(ToyModel(seed), micro_batch=4)


class Seeing(torch.optim.SGD):
    """Keeps the gradients it was given, and moves nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.0)

    def step(self):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def alone(policy, optimizer=Seeing, **settings):
    """The strategy of one process."""
    return Alone(policy, ALONE, Layout(), optimizer(policy.trained.values(), **settings))


def online_batch(model, prompts=3, group_size=4, step=0):
    rows = [{"prompt": f"prompt {'a' * i}"} for i in range(prompts) for _ in range(group_size)]
    conditions, prompt = encode(model, [row["prompt"] for row in rows])
    latents = torch.empty((len(rows), 1, 2, 2), device="meta")
    group = torch.arange(prompts).repeat_interleave(group_size)
    return Batch(latents, prompt, conditions, rows, group), Draws((0, 0, step), range(len(rows)))


def toy_judge(model, reward=None):
    """By default images score the more, the greater their values."""
    score = reward or (lambda images: images.flatten(1).mean(1))
    kind = SimpleNamespace(label="toy", weight=1.0, higher_is_better=True)
    kind.load = lambda device: lambda images, prompts, rows: Scores(score(images))
    return Judge(model, [kind], Path("unused"))
