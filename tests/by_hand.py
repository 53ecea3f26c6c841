"""A velocity that a person can compute, and the samplers' formulas written out a second time."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from toys import ToyModel

from posttrain.condition import Conditions
from posttrain.policy import Policy
from posttrain.support.randomness import Draws

SHAPE = (1, 1, 2)
TABLE = torch.tensor([[0.1], [1.0], [-2.0], [0.7]])
"""The conditions: a number a prompt, the empty one first."""


class Weight(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))


class Linear(ToyModel):
    """v = w x + sigma + c on latents (n, 1, 1, 2): one trained number w, and a condition c of one number."""

    def __init__(self, w=0.5):
        self.transformer = self.module = Weight(w)
        self.device, self.shift, self.divisor = torch.device("cpu"), 3.0, 1

    def latent_shape(self, height, width):
        return SHAPE

    def velocity(self, latents, sigma, condition):
        return self.transformer.w * latents + sigma.view(-1, 1, 1, 1) + condition["c"].view(-1, 1, 1, 1)


def linear_policy(w=0.5, micro_batch=64, **roles):
    """A policy of weight ``w``, with roles of other weights."""
    policy = Policy(Linear(w), micro_batch=micro_batch)
    for name, value in roles.items():
        policy.add_role(name, {"w": torch.tensor(value)})
    return policy


def conditions():
    return Conditions({"c": TABLE.clone()})


def wide(values: Tensor) -> Tensor:
    """(n,) -> (n, 1, 1, 1) float64."""
    return values.double().view(-1, 1, 1, 1)


def velocity(w, x, sigma, prompt, guidance=1.0):
    """The guided velocity of :class:`Linear` in float64."""
    given, empty = (w * x.double() + wide(sigma) + wide(c) for c in (TABLE[prompt], TABLE[0].expand(len(x))))
    return empty + guidance * (given - empty)


def step(dynamics, x, v, s, s_next, level, s_max):
    """Mean and standard deviation of a stochastic step, in float64, from the papers' formulas."""
    s, s_next, s_max = wide(s), wide(s_next), wide(torch.as_tensor(s_max, dtype=torch.float64))
    x0, noise, dt = x - s * v, x + (1 - s) * v, s - s_next
    if dynamics == "cps":
        angle = level * math.pi / 2
        return (1 - s_next) * x0 + s_next * math.cos(angle) * noise, s_next * math.sin(angle)
    if dynamics == "sde":
        return (1 - s_next) * x0, s_next
    if dynamics == "simple":
        return x - dt * v, level * dt.sqrt()
    if dynamics == "dance":
        score = -(x - (1 - s) * x0) / s**2
        return x - dt * (v - level**2 / 2 * score), level * dt.sqrt()
    squared = level**2 * s / (1 - torch.where(s > s_max, s_max, s))
    score = -noise / s
    return x - dt * (v - squared / 2 * score), (squared * dt).sqrt()


def per_item(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def gaussian(x, mean, std):
    """The mean over dimensions of the log-density, (n,)."""
    return per_item(torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x))


def near(found, expected, **kwargs):
    """Equal up to float32's rounding."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(found.double(), expected.double(), **({"rtol": 2e-5, "atol": 1e-5} | kwargs))


@dataclass(frozen=True)
class Given(Draws):
    """Draws of which some are given by purpose."""

    values: dict = field(default_factory=dict)

    def normal(self, purpose, shape):
        return self.values[purpose] if purpose in self.values else super().normal(purpose, shape)

    def uniform(self, purpose, shape=()):
        return self.values[purpose] if purpose in self.values else super().uniform(purpose, shape)


def loss_of(algorithm, items, policy):
    """The losses of items that were collected without the velocities of roles."""
    return algorithm.loss(algorithm.with_frozen_velocities(items, policy), policy)
