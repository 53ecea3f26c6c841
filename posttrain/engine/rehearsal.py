"""How often, and on how many rows, does an algorithm call the model? Its own code is run on a stand-in.

A stand-in model with latents of one number takes the place of the real one, and random scores that of the
rewards. So an algorithm that is added is planned like those that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.algorithm import Algorithm, Batch, Tools, Verdict
from posttrain.condition import Condition, Conditions
from posttrain.model import FlowModel
from posttrain.policy.policy import Policy
from posttrain.support.randomness import Draws


@dataclass(frozen=True)
class Calls:
    """What an algorithm does for one sample."""

    rollout: float
    """Forwards without gradients while it collects."""
    training: float
    """Forward-backwards in its losses."""
    frozen: float
    """Forwards without gradients in its losses."""
    rows_without: int
    """Rows in one forward without gradients, for each sample or item that is in it."""
    rows_with: int
    """The same with gradients."""
    items: float
    item_bytes: tuple[float, float]
    """Memory of a sample's items: bytes, and bytes for each number in its latents."""
    decoded: bool
    """Whether samples become images, to be scored."""

    @property
    def forward_equivalents(self) -> float:
        """A forward-backward counts 3."""
        return self.rollout + self.frozen + 3 * self.training


def rehearse(algorithm: Algorithm) -> Calls:
    """Let ``algorithm`` collect a group of samples, and compute its losses, on a stand-in for the model."""
    (calls, low), (_, high) = (_rehearsed(algorithm, size) for size in (1, 2))
    return Calls(**calls, item_bytes=(2 * low - high, high - low))


def _rehearsed(algorithm: Algorithm, size: int) -> tuple[dict[str, Any], float]:
    model, count = StandIn(), algorithm.samples_per_prompt
    policy = Policy(model, micro_batch=1)
    for role in algorithm.roles:
        policy.add_role(role)
    conditions = Conditions({"c": torch.zeros(2, 1)})
    rows, group = torch.ones(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    metadata = [{"prompt": "rehearsal"}] * count
    shape = (count, 1, 1, size)
    latents = torch.empty(shape, device="meta") if algorithm.needs == "rewards" else torch.rand(shape)
    judge: Any = StandInJudge()
    tools = Tools(policy, Draws((0, 0, 0), range(count)), lambda n: model.sigmas(n, 1, 1), judge)
    with torch.no_grad():
        items = algorithm.collect(Batch(latents, rows, conditions, metadata, group), tools)
    rollout = model.forget()
    for item in items.split(1):
        algorithm.loss(item, policy)
    without, training = (sum(r for r, grad in model.calls if grad is wanted) for wanted in (False, True))
    each = [max((r for r, g in rollout + model.calls if g is wanted), default=1) for wanted in (False, True)]
    return {
        "rollout": sum(r for r, _ in rollout) / count,
        "training": training / count,
        "frozen": without / count,
        "rows_without": each[0],
        "rows_with": each[1],
        "items": len(items) / count,
        "decoded": judge.asked,
    }, items.nbytes / count


class StandIn(FlowModel):
    """A velocity of one parameter, which notes how it is called."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1, bias=False), torch.device("cpu"))
        self.shift = 3.0
        self.calls: list[tuple[int, bool]] = []
        """(rows, whether with gradients) of each call."""

    def forget(self) -> list[tuple[int, bool]]:
        """The calls so far, which are counted anew from here."""
        calls, self.calls = self.calls, []
        return calls

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.calls.append((len(latents), torch.is_grad_enabled()))
        return self.transformer.weight.sum() * latents

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return {"c": torch.zeros(len(prompts), 1)}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a stand-in is given latents")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class StandInJudge:
    """Scores that differ within a group, so that no sample is left out of training."""

    def __init__(self) -> None:
        self.weights, self.asked = {"score": 1.0}, False
        self._seen = 0

    def submit(self, latents: Tensor, batch: Batch) -> Future[Verdict]:
        self.asked = True
        self._seen += len(latents)
        future: Future[Verdict] = Future()
        scores = torch.arange(self._seen - len(latents), self._seen, dtype=torch.float32)
        future.set_result(Verdict({"score": scores**1.5}, {}))
        return future
