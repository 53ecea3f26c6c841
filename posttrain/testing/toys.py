"""A velocity model without a network folder: a small net on 2-D "latents", fast enough for laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.algorithm import Algorithm, Batch, Items, Tools
from posttrain.condition import Condition, Conditions
from posttrain.distributed.world import ALONE
from posttrain.engine.trainer import update
from posttrain.model import FlowModel
from posttrain.optim.settings import Train
from posttrain.parallel.single import Alone
from posttrain.policy import Policy
from posttrain.policy.layout import Layout
from posttrain.reward import Scores
from posttrain.sampling.prompts import encode
from posttrain.scoring.judge import Judge
from posttrain.support.randomness import Draws


class ToyModel(FlowModel):
    """Latents (n, 1, 2, 2); the condition is a vector of 3."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):  # a law may be looking whether anything draws
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(4 + 1 + 3, 32), nn.SiLU(), nn.Linear(32, 4))
        super().__init__(net, torch.device("cpu"))
        self.shift, self.divisor = 3.0, 1

    def sigmas(self, steps: int, height: int, width: int) -> list[float]:
        return torch.linspace(1, 0, steps + 1).tolist()

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return {"c": torch.stack([torch.tensor([len(p), p.count("a"), 1.0]) / 10 for p in prompts])}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels, torch.full_like(pixels, -30.0)

    def latents(self, mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
        return mean

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (1, 2, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        features = torch.cat([latents.flatten(1), sigma[:, None], condition["c"]], 1)
        return self.module(features).view_as(latents)

    def save(self, *arguments: Any, **named: Any) -> None:
        raise AssertionError("the toy model is never written")

    save_lora = load_weights = save


class Thumbnails(ToyModel):
    """Latents (n, 3, h / 8, w / 8): the mean colours of an image's squares of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.divisor = 8

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return super().posterior(nn.functional.avg_pool2d(pixels, 8))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (3, height // 8, width // 8)


def toy_batch(model: FlowModel, n: int = 6, step: int = 0, seed: int = 0) -> tuple[Batch, Draws]:
    """n latents of a normal distribution about 1, each with a prompt, and their draws."""
    prompts = [f"prompt {'a' * (i % 3)}" for i in range(n)]
    conditions = Conditions(model.encode_prompts(["", *prompts]))
    draws = Draws((seed, 0, step), range(n))
    latents = draws.normal("data", (1, 2, 2)) * 0.3 + 1
    return Batch(latents, torch.arange(1, n + 1), conditions), draws


def toy_policy(seed: int = 0) -> Policy:
    """A policy of the toy model, with micro-batches of 4."""
    return Policy(ToyModel(seed), micro_batch=4)


class Seeing(torch.optim.SGD):
    """Keeps the gradients it was given, and moves nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)
        self.seen: list[Tensor] = []

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def alone(policy: Policy, optimizer: Callable[..., torch.optim.Optimizer] = Seeing, **settings: Any) -> Alone:
    """The strategy of one process."""
    return Alone(policy, ALONE, Layout(), optimizer(policy.trained.values(), **settings))


def online_batch(
    model: FlowModel, prompts: int = 3, group_size: int = 4, step: int = 0
) -> tuple[Batch, Draws]:
    """A batch of prompts in groups, without images, and its draws."""
    rows = [{"prompt": f"prompt {'a' * i}"} for i in range(prompts) for _ in range(group_size)]
    conditions, prompt = encode(model, [row["prompt"] for row in rows])
    latents = torch.empty((len(rows), 1, 2, 2), device="meta")
    group = torch.arange(prompts).repeat_interleave(group_size)
    return Batch(latents, prompt, conditions, rows, group), Draws((0, 0, step), range(len(rows)))


def toy_judge(model: FlowModel, reward: Callable[[Tensor], Tensor] | None = None) -> Judge:
    """By default images score the more, the greater their values."""
    score = reward or (lambda images: images.flatten(1).mean(1))

    def load(device: torch.device) -> Callable[..., Scores]:
        return lambda images, prompts, rows: Scores(score(images))

    kind: Any = SimpleNamespace(label="toy", weight=1.0, higher_is_better=True, limit_minutes=None, load=load)
    return Judge(model, [kind], Path("unused"))


def collected(
    algorithm: Algorithm,
    policy: Policy,
    *,
    prompts: int = 6,
    step: int = 0,
    reward: Callable[[Tensor], Tensor] | None = None,
    micro_batch: int = 4,
) -> Items:
    """What ``algorithm`` collects from a toy batch of ``prompts`` groups at ``step``; adds its roles."""
    for role in algorithm.roles:
        policy.add_role(role, moves=role != "reference")
    policy.micro_batch, model = micro_batch, policy.model
    grid: Mapping[str, Any] = {}
    if algorithm.needs == "prompts":
        batch, draws = online_batch(model, prompts, algorithm.samples_per_prompt, step)
        grid = {"sigmas": lambda steps: model.sigmas(steps, 2, 2)}
    else:
        batch, draws = toy_batch(model, prompts * algorithm.samples_per_prompt, step)
    with torch.no_grad(), toy_judge(model, reward) as judge:
        asked = judge if algorithm.uses_rewards else None
        return algorithm.collect(algorithm.as_given(batch), Tools(policy, draws, judge=asked, **grid))


def gradient(algorithm: Algorithm, micro_batch: int) -> Tensor:
    """The gradient of all weights, flat, of one step on a toy batch in micro-batches of that size."""
    policy = toy_policy()
    items = collected(algorithm, policy)
    settings, policy.micro_batch = Train(steps=1, max_grad_norm=1e9), micro_batch
    seeing = Seeing(policy.trained.values())
    update(algorithm, policy, items, Alone(policy, ALONE, Layout(), seeing), settings)
    return torch.cat([gradient.flatten() for gradient in seeing.seen])
