"""What the two online benchmarks share: an iteration as the engine makes it, and the groups it works on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _bench import Bench, bench, watched
from torch import Tensor

from posttrain.algorithm import Algorithm, Batch, Tools
from posttrain.distributed.world import ALONE
from posttrain.engine.trainer import update
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.policy import Policy
from posttrain.policy.tuning import Lora
from posttrain.rewards.jpeg import JpegIncompressibility
from posttrain.sampling.prompts import encode
from posttrain.scoring.judge import Judge
from posttrain.support.randomness import Draws


class Iteration:
    """Everything that an iteration of ``algorithm`` on ``options.batch`` samples needs."""

    def __init__(self, options: argparse.Namespace, algorithm: Algorithm, it: Bench | None = None) -> None:
        """``it`` is a model that is there already, with a LoRA; its parts are not timed."""
        self.it: Bench = it or bench(options, Lora())
        self.algorithm, self.side = algorithm, options.resolution
        self.count, self.size = options.batch, algorithm.samples_per_prompt
        self.model, self.micro = self.it.model, options.micro_batch
        self.settings = Train(steps=1, batch_size=self.count, learning_rate=1e-5)
        self.policy: Policy = self.it.policy(self.micro)
        self.strategy = Single().prepare(self.policy, self.settings, ALONE)
        for role in algorithm.roles:
            self.policy.add_role(role)
        self.prompts = [p for p in self.it.captions(self.count // self.size) for _ in range(self.size)]
        self.draws = Draws((0, 0, 0), range(self.count), self.it.device)
        self.judge = Judge(self.model, [JpegIncompressibility()], Path("failed_reward"))
        if it is None:
            watched(self.it)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.model.latent_shape(self.side, self.side)

    def sigmas(self, steps: int) -> list[float]:
        return self.model.sigmas(steps, self.side, self.side)

    def engine(self) -> None:
        """One iteration: prompts encoded once, chunks of samples scored beside the next ones' rollout."""
        conditions, rows = encode(self.model, self.prompts)
        group = torch.arange(self.count // self.size).repeat_interleave(self.size)
        metadata = [{"prompt": p} for p in self.prompts]
        latents = torch.empty(self.count, *self.shape, device="meta")
        batch = Batch(latents, rows, conditions, metadata, group)
        with torch.no_grad(), self.policy.casts_kept():
            items = self.algorithm.collect(batch, Tools(self.policy, self.draws, self.sigmas, self.judge))
        with self.it.timed("training"):
            update(self.algorithm, self.policy, items, self.strategy, self.settings)
        self.algorithm.after_batch(self.policy, 1)

    def rewards(self, x0: Tensor) -> Tensor:
        """Each sample's score, (n,), waited for."""
        (score,) = self.judge.scorers.values()
        images = torch.cat([self.model.decode(part) for part in x0.split(self.micro)]).float().cpu()
        return score(images, self.prompts, [{"prompt": p} for p in self.prompts]).value.to(x0.device)

    def advantages(self, x0: Tensor) -> Tensor:
        """Rewards compared in their groups, over the deviation of all, (n,)."""
        rewards = self.rewards(x0)
        centred = rewards - rewards.view(-1, self.size).mean(1).repeat_interleave(self.size)
        return (centred / (rewards.std() + 1e-4)).clamp(-5, 5)

    def step(self, loss_of: Callable[[slice], Tensor]) -> None:
        """One optimizer step on the mean of the losses of the samples in each slice."""
        self.strategy.zero_grad()
        for start in range(0, self.count, self.micro):
            self.strategy.backward(loss_of(slice(start, start + self.micro)).sum() / self.count)
        self.strategy.step(1.0)

    def velocity(self, x: Tensor, sigma: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The model's velocity under autocast, without the engine's policy."""
        at = torch.full((len(x),), sigma, device=x.device) if isinstance(sigma, float) else sigma
        with torch.autocast(x.device.type, dtype=self.it.autocast, enabled=self.it.autocast is not None):
            return self.model.velocity(x, at, condition)

    def condition(self, prompts: list[str]) -> dict[str, Tensor]:
        """Every sample's prompt encoded by itself, as one row each."""
        parts = [self.model.encode_prompts(prompts[i : i + 1]) for i in range(len(prompts))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
