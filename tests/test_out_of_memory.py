"""What does not fit is done again in halves, or stops with the number to go on with."""

import logging
from dataclasses import replace

import pytest
import torch
from toys import ToyModel, alone, toy_batch, toy_policy

from posttrain.algorithm import Algorithm, Tools
from posttrain.algorithms.sft import SFT
from posttrain.distributed.world import World
from posttrain.engine.trainer import train, update
from posttrain.errors import RewardError, TrainingError
from posttrain.optim.settings import Train
from posttrain.policy import Policy
from posttrain.policy.out_of_memory import OutOfMemory, halve_until_it_fits, is_out_of_memory


class Small(ToyModel):
    """Has memory for so many rows with gradients."""

    room = 2

    def velocity(self, latents, sigma, condition):
        if torch.is_grad_enabled() and len(latents) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().velocity(latents, sigma, condition)


class Late(ToyModel):
    """Has no memory for the second forward of four rows, when there are gradients already."""

    calls = 0

    def velocity(self, latents, sigma, condition):
        self.calls += torch.is_grad_enabled()
        if self.calls == 2 and len(latents) == 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")
        return super().velocity(latents, sigma, condition)


def gradient(model, chunk, world=None):
    policy = Policy(model, micro_batch=chunk)
    batch, draws = toy_batch(policy.model, n=10)
    with torch.no_grad():
        items = SFT().collect(batch, Tools(policy, draws))
    strategy, settings = alone(policy), Train(steps=1, max_grad_norm=1e9)

    def undone():
        strategy.zero_grad()
        return True

    halve_until_it_fits(lambda: update(SFT(), policy, items, strategy, settings), policy, undone)
    return torch.cat([gradient.flatten() for gradient in strategy.optimizer.seen]), policy


@pytest.mark.parametrize("model", [Small, Late])
def test_what_does_not_fit_is_done_again_in_halves_and_counts_once(model, caplog):
    whole, _ = gradient(ToyModel(), 2)
    with caplog.at_level(logging.WARNING):
        found, policy = gradient(model(), 4)
    assert torch.equal(found, whole)
    assert policy.micro_batch == 2
    assert "out of memory with 4 rows at a time; continuing with 2" in caplog.text


def test_a_row_that_does_not_fit_alone_stops_the_run():
    small = Small()
    small.room = 0
    with pytest.raises(TrainingError, match=r"one row at a time .*gradient_checkpointing.*posttrain plan"):
        gradient(small, 4)


def test_other_errors_are_not_tried_again():
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    # what a reward's server says of its own memory is not this machine's
    caused = RewardError("HTTP 500: CUDA out of memory")
    assert not is_out_of_memory(caused)
    caused.__cause__ = torch.OutOfMemoryError("out of memory")
    assert is_out_of_memory(caused)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    calls = []

    def wrong():
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        halve_until_it_fits(wrong, toy_policy(), lambda: True)
    assert len(calls) == 1


class Checked(Algorithm):
    """Notes what it is asked to check."""

    type: str = "checked-in-test"
    needs = "images"

    def collect(self, batch, tools):
        return SFT().collect(batch, tools)

    def loss(self, items, policy):
        return SFT().loss(items, policy)

    def check_on_policy(self, losses):
        CHECKED.append(len(losses.per_item))


CHECKED = []


class Nothing:
    def before_batch(self, step):
        return True

    def after_step(self, *_):
        pass


@pytest.mark.parametrize(
    ("model", "chunk", "seen"),
    [
        (ToyModel, 4, [4]),
        (Small, 4, [2]),  # whose first step runs in smaller chunks than its items were collected in
        (ToyModel, 64, [8]),  # a batch that does not fill the chunk is checked as it was collected
    ],
)
def test_the_first_batch_that_is_trained_as_it_was_collected_is_checked_once(model, chunk, seen):
    CHECKED.clear()
    policy = Policy(model(), micro_batch=chunk)
    drawn = []

    def batches():
        for step in range(3):
            batch, draws = toy_batch(policy.model, n=8, step=step)
            drawn.append(step)
            yield batch, Tools(policy, draws)

    strategy = alone(policy, torch.optim.SGD, lr=0.1)
    train(Checked(), policy, strategy, batches(), Train(steps=3), Nothing())
    assert seen == CHECKED
    assert len(drawn) == 3


def test_processes_that_would_wait_for_each_other_stop_with_the_number_to_go_on_with(monkeypatch):
    policy = Policy(Small(), micro_batch=4)
    strategy = alone(policy)
    strategy.world = replace(strategy.world, size=2)
    monkeypatch.setattr(World, "max", lambda self, value: value)  # there is no second process in this test

    def no_room(*_):
        raise torch.OutOfMemoryError("out of memory")

    batch, draws = toy_batch(policy.model)
    failing = Checked()
    object.__setattr__(failing, "collect", no_room)
    with pytest.raises(OutOfMemory, match="with 4 rows at a time") as found:
        train(failing, policy, strategy, iter([(batch, Tools(policy, draws))]), Train(steps=1), Nothing())
    assert found.value.micro_batch == 2


def test_an_optimizer_step_is_never_taken_twice():
    class Halfway(torch.optim.SGD):
        """Moves the first weights, and has no memory for the rest."""

        def step(self):
            first = self.param_groups[0]["params"][0]
            first.data += 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    policy = Policy(ToyModel(), micro_batch=4)
    batch, draws = toy_batch(policy.model)
    strategy = alone(policy, Halfway, lr=0.1)
    first = next(iter(policy.trained.values()))
    before = first.detach().clone()
    with pytest.raises(TrainingError, match=r"in the optimizer's step .*adamw8bit"):
        train(SFT(), policy, strategy, iter([(batch, Tools(policy, draws))]), Train(steps=1), Nothing())
    assert policy.micro_batch == 4
    torch.testing.assert_close(first.detach(), before + 1)


def test_what_is_halved_is_what_was_tried(caplog):
    """A chunk is often larger than what there was to put into it."""
    policy = Policy(Small(), micro_batch=64)
    batch, draws = toy_batch(policy.model, n=8)
    with caplog.at_level(logging.WARNING):
        train(SFT(), policy, alone(policy), iter([(batch, Tools(policy, draws))]), Train(steps=1), Nothing())
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]


def test_a_role_that_has_no_room_to_come_in_changes_nothing(monkeypatch):
    policy = toy_policy()
    policy.add_role("old", {n: p.detach() + 1 for n, p in policy.trained.items()})
    before = {n: p.detach().clone() for n, p in policy.trained.items()}
    clone, empty = torch.Tensor.clone, torch.empty

    def none(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", none)
        with pytest.raises(torch.OutOfMemoryError), policy.using("old"):
            pass
    assert all(torch.equal(p, before[n]) for n, p in policy.trained.items())
    with policy.using("old"):
        # nor has it to ask for room on its way out
        monkeypatch.setattr(torch, "empty", none)
        monkeypatch.setattr(torch.Tensor, "clone", none)
        assert all(torch.equal(p, before[n] + 1) for n, p in policy.trained.items())
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "clone", clone)
    assert all(torch.equal(p, before[n]) for n, p in policy.trained.items())
