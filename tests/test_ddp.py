"""Data parallel on ranks that are threads: gradients of all ranks are added up, not averaged, once a step."""

import warnings

import pytest
import torch
from lines import Line
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from posttrain.optim.settings import Train
from posttrain.parallel import ddp
from posttrain.parallel.ddp import DDP
from posttrain.parallel.shares import Shares
from posttrain.policy import Policy, masters


class Scales(nn.Module):
    """Multiplies by its weights; has a buffer that differs between ranks."""

    def __init__(self, *sizes):
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(size) for size in sizes)
        self.register_buffer("own", torch.zeros(1))

    def forward(self, x):
        return sum((weight * x).sum() for weight in self.weights)


class Scaled(Line):
    """The velocity comes from the module itself, which a strategy may wrap."""

    def __init__(self, *sizes):
        super().__init__()
        self.transformer = self.module = Scales(*sizes)

    def velocity(self, latents, sigma, condition):
        return self.module(latents).expand_as(latents) / latents.numel()


def prepared(world, *sizes, autocast=None, **settings):
    policy = Policy(Scaled(*sizes), autocast=autocast)
    train = Train(steps=9, learning_rate=0.5, weight_decay=0.0, **settings)
    return policy, DDP().prepare(policy, train, world)


def backward(policy, strategy, x, last):
    strategy.begin_micro_batch(last=last)
    strategy.backward(policy.velocity(torch.full((1, 1), x), torch.zeros(1), {}).sum())


def gradients(policy):
    return [parameter.grad.flatten().tolist() for parameter in policy.trained.values()]


def test_in_float32_gradients_are_exchanged_and_added_up_in_the_last_backward_of_a_step():
    def work(world):
        policy, strategy = prepared(world, 1, (1, 2))
        found = []
        for step in range(2):
            for last in (False, True):
                backward(policy, strategy, 2.0 ** (world.rank + 2 * last + step), last)
                found.append(gradients(policy))
            strategy.zero_grad()
        return found

    # rank 0 has x of 1, then 4; rank 1 of 2, then 8; all twice as large in the second step. The wrapper
    # averages what it exchanges, so a rank holds twice its own before
    ranks = on_ranks(2, work)
    for rank, found in enumerate(ranks):
        own = 2 * (rank + 1)
        assert found == [[[n], [n] * 2] for n in (own, 15, 2 * own, 30)]


def test_in_bf16_gradients_are_added_up_beside_the_masters_before_the_step(monkeypatch):
    monkeypatch.setattr(masters, "ADDED_AT_ONCE", 3)
    sent = []

    def work(world):
        policy, strategy = prepared(world, 1, (1, 2), 2, autocast=torch.bfloat16)
        assert type(policy.model.module) is Scales, "nothing is wrapped"
        backward(policy, strategy, 1.0 + world.rank, False)
        backward(policy, strategy, 4.0 * (1.0 + world.rank), True)
        before = gradients(policy)
        if world.rank == 0:
            plain = type(world).sum
            monkeypatch.setattr(
                type(world), "sum", lambda w, t: sent.append((w.rank, t.numel())) or plain(w, t)
            )
        world.barrier()
        return before, strategy.step(1e9)

    ranks = on_ranks(2, work)
    for rank, (before, norm) in enumerate(ranks):
        assert before == [[n] * size for n, size in zip([5 * (rank + 1)] * 3, (1, 2, 2), strict=True)]
        assert norm == pytest.approx(15 * 5**0.5)
    assert sorted(sent) == [(0, 2), (0, 3), (1, 2), (1, 3)], "in groups of limited size"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_gradients_of_weights_of_several_values_keep_their_places(autocast):
    def work(world):
        policy, strategy = prepared(world, (2, 3), 3, autocast=autocast)
        x = torch.arange(3.0) + 10 * world.rank
        strategy.begin_micro_batch(last=True)
        strategy.backward(policy.velocity(x, torch.zeros(1), {}).sum())
        held = {}
        strategy.optimizer.step = lambda: held.update(dict(enumerate(gradients(policy))))
        strategy.step(1e9)
        return held

    total = [10.0, 12.0, 14.0]
    assert on_ranks(2, work) == [{0: total * 2, 1: total}] * 2


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_ranks_step_alike_with_the_settings_of_the_stage(autocast):
    def work(world):
        policy, strategy = prepared(world, 1, autocast=autocast)
        assert strategy.optimizer.param_groups[0]["lr"] == 0.5
        assert not strategy.repeatable
        assert strategy.tries_alone
        backward(policy, strategy, 1.0 + world.rank, True)
        assert strategy.step(1e9) == 3
        return [p.item() for p in policy.trained.values()]

    assert on_ranks(2, work) == [[pytest.approx(0.5)]] * 2  # Adam's first step is the learning rate


def test_the_model_computes_with_the_wrapper_until_the_stage_ends():
    def work(world):
        policy, strategy = prepared(world, 1)
        policy.model.transformer.own.fill_(world.rank)
        wrapped = policy.model.module
        assert type(wrapped) is DistributedDataParallel
        assert wrapped.module is policy.model.transformer
        backward(policy, strategy, 1.0, True)
        gradient = policy.trained["weights.0"].grad
        assert gradient._base is not None, "gradients lie in the buckets that are sent"
        strategy.close()
        assert policy.model.module is policy.model.transformer
        return policy.model.transformer.own.item()

    assert on_ranks(2, work) == [0, 1], "buffers are each rank's own"


@pytest.mark.parametrize(("device", "ids"), [("cpu", None), ("cuda:1", [torch.device("cuda", 1)])])
def test_the_wrapper_gets_the_models_gpu_and_exchanges_gradients_alone(monkeypatch, recwarn, device, ids):
    def wrapper(module, **options):
        warnings.warn("broadcast_buffers is old", FutureWarning, stacklevel=2)
        return module, options

    monkeypatch.setattr(ddp, "DistributedDataParallel", wrapper)
    policy = Policy(Scaled(1))
    policy.model.device = torch.device(device)
    options = {"device_ids": ids, "broadcast_buffers": False, "gradient_as_bucket_view": True}
    assert ddp._wrapped(policy) == (policy.model.transformer, options)
    warnings.warn("other", FutureWarning, stacklevel=2)
    said = [str(warning.message) for warning in recwarn.list if warning.category is FutureWarning]
    assert said == ["other"], "names that torch will replace are no news to people"


def test_what_the_block_says():
    assert (DDP().strategy, DDP().needs_group, DDP().problem(9)) == ("ddp", True, None)
    assert DDP().shares(2) == Shares(keeps_gradients=True)
