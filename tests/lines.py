"""A policy of two weights and an algorithm that is linear in one: every step can be done by hand."""

import torch
from torch import nn
from toys import ToyModel

from posttrain.algorithm import Algorithm, Batch, Items, Losses, Tools
from posttrain.condition import Conditions
from posttrain.distributed.world import ALONE
from posttrain.parallel.single import Alone
from posttrain.parallel.strategy import Layout
from posttrain.policy import Policy
from posttrain.support.randomness import Draws


class Pair(nn.Module):
    """``a`` is trained, ``b`` is not."""

    def __init__(self, a, b):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([float(a)]))
        self.b = nn.Parameter(torch.tensor([float(b)]), requires_grad=False)


class Line(ToyModel):
    """velocity = a x + b c - sigma; notes the rows, the gradient mode and the autocast type of each forward."""

    def __init__(self, a=1.0, b=1.0):
        self.transformer = self.module = Pair(a, b)
        self.device, self.shift, self.divisor = torch.device("cpu"), 3.0, 1
        self.seen = []

    def velocity(self, latents, sigma, condition):
        lowered = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.seen.append((len(latents), torch.is_grad_enabled(), lowered))
        a, b = self.module.a, self.module.b
        return a * latents + (b * condition["c"] - sigma).view(-1, *[1] * (latents.ndim - 1))


class Pull(Algorithm):
    """The loss of an item is a x - 1: its gradient is x, so a step goes down by the weighted mean of x."""

    type: str = "pull-in-test"
    needs = "images"

    def collect(self, batch, tools):
        assert not torch.is_grad_enabled()
        NOTES.append(("collect", tools.policy.trained["a"].item()))
        x = batch.latents.flatten()
        fields = {"x": x, "prompt_index": batch.prompt_index, "sample_index": batch.sample_index}
        metrics = {"mean_x": x.mean(), "twice": torch.tensor(99.0)}
        return Items(
            batch.metadata[0]["weight"] if batch.metadata else torch.ones_like(x),
            fields,
            batch.conditions,
            metrics,
        )

    def loss(self, items, policy):
        assert torch.is_grad_enabled()
        NOTES.append(("loss", items.x.tolist(), items.weight.tolist()))
        return Losses(policy.trained["a"] * items.x - 1, {"twice": 2 * items.x})

    def check_on_policy(self, losses):
        NOTES.append(("check", losses.per_item.tolist()))

    def after_batch(self, policy, step):
        NOTES.append(("after", step, policy.trained["a"].item()))


NOTES = []
"""What :class:`Pull` was asked, in order; to be cleared by each test."""


def noted(kind):
    """What was noted of that kind, without the kind."""
    return [note[1:] if len(note) > 2 else note[1] for note in NOTES if note[0] == kind]


def line_policy(a=1.0, b=1.0, micro_batch=64, **options):
    return Policy(Line(a, b), micro_batch=micro_batch, **options)


def of(x, weight=None, sample_index=None, **metadata):
    """A batch of samples with the numbers ``x``, which items of ``weight`` are made of, and tools for it."""

    def made(policy):
        n, values = len(x), torch.tensor(x, dtype=torch.float32)
        rows = [{"weight": torch.tensor(weight, dtype=torch.float32)}] * n if weight else ()
        conditions = Conditions({"c": torch.arange(n + 1, dtype=torch.float32)})
        where = {} if sample_index is None else {"sample_index": torch.tensor(sample_index)}
        batch = Batch(values.view(-1, 1), torch.arange(1, n + 1), conditions, rows, **where, **metadata)
        return batch, Tools(policy, Draws((0, 0, 0), range(n)))

    return made


def items_of(x, weight=None, sample_index=None):
    n, values = len(x), torch.tensor(x, dtype=torch.float32)
    return Items(
        torch.ones(n) if weight is None else torch.tensor(weight, dtype=torch.float32),
        {
            "x": values,
            "prompt_index": torch.arange(1, n + 1),
            "sample_index": torch.arange(n) if sample_index is None else torch.tensor(sample_index),
        },
        Conditions({"c": torch.arange(n + 1, dtype=torch.float32)}),
    )


def descending(policy, lr=1.0, world=ALONE):
    """The strategy of plain gradient descent."""
    return Alone(policy, world, Layout(), torch.optim.SGD(policy.trained.values(), lr=lr))


class Steps:
    """A watch that notes what it is told, and ends the stage before the batch after ``last`` steps."""

    def __init__(self, last=10**9):
        self.last, self.asked, self.told, self.not_taken = last, [], [], []

    def before_batch(self, step):
        self.asked.append(step)
        return step < self.last

    def after_step(self, step, samples, metrics):
        self.told.append((step, samples, {name: float(value) for name, value in metrics.items()}))

    def refused(self, step, error):
        self.not_taken.append((step, str(error), error.samples))
