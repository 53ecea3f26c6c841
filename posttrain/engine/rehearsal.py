"""Counts how often an algorithm calls the model, by running the algorithm on a stand-in for the model.

The stand-in has latents of one or two numbers, and scores that are made up take the place of the rewards. So
a new algorithm is planned without any formula of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.algorithm import Algorithm, Batch, Items, Tools, Verdict
from posttrain.condition import Condition, Conditions
from posttrain.engine.answers import collected, losses_of
from posttrain.flow.guidance import CLASSIFIER_FREE, ClassifierFree
from posttrain.model import FlowModel
from posttrain.policy.policy import Policy
from posttrain.support.randomness import Draws


@dataclass(frozen=True)
class Calls:
    """What an algorithm costs for one sample."""

    rollout: float
    """Forwards without gradients while it collects."""
    training: float
    """Forward-backwards in its losses."""
    frozen: float
    """Forwards without gradients in its losses."""
    rows_without: int
    """Rows of one sample or item in a forward without gradients, e.g. 2 under guidance."""
    rows_with: int
    """Rows of one item in a forward with gradients."""
    items: float
    item_bytes: tuple[float, float]
    """Memory of a sample's items: bytes, and bytes per number in its latents."""
    decoded: bool
    """Whether samples are decoded to images and scored."""

    @property
    def forward_equivalents(self) -> float:
        """The cost in forwards of one sample; a forward-backward counts 3."""
        return self.rollout + self.frozen + 3 * self.training


def rehearse(algorithm: Algorithm, rule: ClassifierFree = CLASSIFIER_FREE) -> Calls:
    """Let ``algorithm`` collect one group of samples and compute its losses on the stand-in model, which is
    guided by ``rule``."""
    first, second = (Rehearsal(algorithm, size, rule) for size in (1, 2))
    each_number = (second.bytes_per_sample - first.bytes_per_sample) / SQUARE**2
    count, rollout, losses = first.samples, first.rollout, first.losses
    return Calls(
        rollout=sum(call.rows for call in rollout) / count,
        training=sum(call.rows for call in losses if call.gradients) / count,
        frozen=sum(call.rows for call in losses if not call.gradients) / count,
        rows_without=max((call.rows for call in rollout + losses if not call.gradients), default=1),
        rows_with=max((call.rows for call in rollout + losses if call.gradients), default=1),
        items=len(first.items) / count,
        item_bytes=(first.bytes_per_sample - SQUARE**2 * each_number, each_number),
        decoded=first.decoded,
    )


SQUARE = 2
"""The side of the latents: a guidance rule may work on tokens of 2 x 2."""


@dataclass(frozen=True)
class Call:
    """One call of the stand-in model."""

    rows: int
    gradients: bool


class Rehearsal:
    """One run of an algorithm on the stand-in model, with latents of so many ``channels``."""

    def __init__(self, algorithm: Algorithm, channels: int, rule: ClassifierFree = CLASSIFIER_FREE) -> None:
        model, judge, self.samples = StandIn(), StandInJudge(), algorithm.samples_per_prompt
        model.guidance_rule = rule
        policy = Policy(model, micro_batch=1)
        for role in algorithm.roles:
            policy.add_role(role)
        tools = Tools(policy, Draws((0, 0, 0), range(self.samples)), lambda n: model.sigmas(n, 1, 1), judge)
        with torch.no_grad():
            self.items: Items = collected(algorithm, _group(algorithm, channels), tools)
        self.rollout, self.decoded = list(model.calls), judge.asked
        model.calls.clear()
        for item in self.items.split(1):
            losses_of(algorithm, item, policy)
        self.losses = model.calls

    @property
    def bytes_per_sample(self) -> float:
        return self.items.nbytes / self.samples


def _group(algorithm: Algorithm, channels: int) -> Batch:
    """A batch of one group, whose latents have so many ``channels``."""
    count = algorithm.samples_per_prompt
    batch = Batch(
        torch.rand(count, channels, SQUARE, SQUARE),
        torch.ones(count, dtype=torch.int64),
        Conditions({"c": torch.zeros(2, 1)}),
        [{"prompt": "rehearsal"}] * count,
        torch.zeros(count, dtype=torch.int64),
    )
    return algorithm.as_given(batch)


class StandIn(FlowModel):
    """A velocity of one parameter that records its calls."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1, bias=False), torch.device("cpu"))
        self.shift = 3.0
        self.calls: list[Call] = []

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.calls.append(Call(len(latents), torch.is_grad_enabled()))
        return self.transformer.weight.sum() * latents

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return {"c": torch.zeros(len(prompts), 1)}

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the stand-in model has latents only")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return (1, SQUARE, SQUARE)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class StandInJudge:
    """Scores that differ within a group, so that no sample is left out of training."""

    def __init__(self) -> None:
        self.weights: Mapping[str, float] = {"score": 1.0}
        self.asked = False
        self._scored = 0

    def submit(self, latents: Tensor, batch: Batch) -> Future[Verdict]:
        self.asked = True
        scores = torch.arange(self._scored, self._scored + len(latents), dtype=torch.float32)
        self._scored += len(latents)
        future: Future[Verdict] = Future()
        future.set_result(Verdict({"score": scores**1.5}, {}))
        return future
