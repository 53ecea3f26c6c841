"""One process's strategy: it clips, steps, forgets, and keeps the optimizer's state by the weight's name."""

import math
from types import SimpleNamespace

import pytest
import torch
from lines import Line, descending, line_policy
from stored import stored

from posttrain.distributed.world import ALONE
from posttrain.optim.settings import Train
from posttrain.parallel.shares import Shares
from posttrain.parallel.single import Alone, Single
from posttrain.parallel.strategy import Layout, Parallel, Strategy
from posttrain.policy import Policy
from posttrain.policy.piece import Piece


def kept(moments):
    """Moments as a checkpoint has them."""
    return {name: {key: stored(t) for key, t in of.items()} for name, of in moments.items()}


def two_weights(a=3.0, b=4.0):
    policy = line_policy(a, b)
    policy.parameters["b"].requires_grad_(True)
    policy.find_parameters()
    return policy


def test_the_norm_of_all_gradients_is_clipped_and_told():
    policy = two_weights(0, 0)
    strategy = descending(policy)
    strategy.backward(3 * policy.parameters["a"].sum())
    strategy.backward(4 * policy.parameters["b"].sum())
    assert strategy.step(2.5) == pytest.approx(5)
    found = [p.item() for p in policy.trained.values()]
    assert found == pytest.approx([-1.5, -2], abs=1e-5)
    assert all(p.grad is None for p in policy.trained.values())
    strategy.backward(policy.parameters["a"].sum())
    assert strategy.step(2.5) == pytest.approx(1), "a norm below is left as it is"
    assert policy.parameters["a"].item() == pytest.approx(-2.5, abs=1e-5)


def test_in_bf16_gradients_and_steps_go_to_the_masters_and_their_copies_follow():
    policy = line_policy(3, autocast=torch.bfloat16)
    strategy = Single().prepare(policy, Train(steps=1, learning_rate=0.5, weight_decay=0.0), ALONE)
    low, master = policy.masters.copies["a"], policy.trained["a"]
    assert (low.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    strategy.backward(2 * low.sum())
    assert (low.grad, master.grad.item()) == (None, 2)
    low.grad = torch.ones_like(low)  # as a backward leaves it that fails
    strategy.zero_grad()
    assert (low.grad, master.grad) == (None, None)
    strategy.backward(2 * low.sum())
    assert strategy.step(1.0) == 2
    assert (low.item(), master.item()) == (2.5, pytest.approx(2.5)), "Adam's first step is the learning rate"


@pytest.mark.parametrize("gradient", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_forgotten(gradient):
    policy = line_policy(3)
    strategy = descending(policy)
    strategy.backward((policy.trained["a"] * gradient).sum())
    assert not math.isfinite(strategy.step(1.0))
    assert policy.trained["a"].item() == 3
    assert policy.trained["a"].grad is None


def test_one_process_can_begin_a_step_anew():
    policy = line_policy()
    strategy = descending(policy)
    strategy.backward(policy.trained["a"].sum())
    strategy.zero_grad()
    assert policy.trained["a"].grad is None
    assert strategy.repeatable
    assert not Alone.__base__.repeatable
    assert strategy.tries_alone
    assert not Alone.__base__.tries_alone


def test_moments_go_by_name_and_are_tensors_of_their_own():
    policy = two_weights()
    strategy = Single().prepare(policy, Train(steps=1, learning_rate=0.5), ALONE)
    assert strategy.optimizer.param_groups[0]["lr"] == 0.5
    assert (strategy.policy, strategy.world, type(strategy.layout)) == (policy, ALONE, Layout)
    assert strategy.moments("a") == {}
    step = torch.tensor(4.0)
    given = {"b": {"step": step, "exp_avg": torch.tensor([2.0]), "exp_avg_sq": torch.tensor([3.0])}}
    strategy.load_moments(kept(given))
    assert strategy.moments("a") == {}
    found = strategy.moments("b")
    assert {name: p.values.item() for name, p in found.items()} == {"step": 4, "exp_avg": 2, "exp_avg_sq": 3}
    assert all(found[name].values.data_ptr() != given["b"][name].data_ptr() for name in found)
    assert all(p.everywhere and p.shape == p.values.shape for p in found.values())
    state = strategy.optimizer.state[policy.parameters["b"]]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert strategy.optimizer.param_groups[0]["lr"] == 0.5
    # Adam's fifth step from these: m = 0.9 * 2 + 0.1 * 1, v = 0.999 * 3 + 0.001 * 1
    policy.parameters["b"].grad = torch.ones(1)
    strategy.optimizer.step()
    m, v = 1.9 / (1 - 0.9**5), 2.998 / (1 - 0.999**5)
    assert policy.parameters["b"].item() == pytest.approx(4 * (1 - 0.5 * 0.01) - 0.5 * m / math.sqrt(v))


def test_an_optimizer_that_counts_in_plain_numbers_gets_them_back():
    policy = two_weights()
    strategy = descending(policy)
    strategy.load_moments(kept({"a": {"step": torch.tensor(4), "m": torch.tensor([2.0])}}))
    state = strategy.optimizer.state[policy.parameters["a"]]
    assert state == {"step": 4, "m": torch.tensor([2.0])}
    assert type(state["step"]) is int
    assert {n: (type(p.values), p.values.item()) for n, p in strategy.moments("a").items()} == {
        "step": (torch.Tensor, 4),
        "m": (torch.Tensor, 2),
    }


def test_moments_are_placed_as_the_strategy_lays_them():
    class Placed(Alone):
        def as_moment(self, parameter, stored):
            assert parameter is self.policy.trained["a"]
            return -stored.whole()

    policy = line_policy()
    strategy = Placed(policy, ALONE, Layout(), torch.optim.AdamW(policy.trained.values()))
    strategy.load_moments(kept({"a": {"step": torch.tensor(4.0), "exp_avg": torch.tensor([2.0])}}))
    assert {n: p.values.tolist() for n, p in strategy.moments("a").items()} == {"step": -4, "exp_avg": [-2]}


def test_moments_go_straight_to_the_device_of_their_weight():
    policy = line_policy()
    weight = torch.nn.Parameter(torch.empty(1, device="meta"))
    found = [descending(policy).as_moment(weight, stored(t)) for t in (torch.ones(1), torch.tensor(4.0))]
    assert [t.device.type for t in found] == ["meta", "cpu"], (
        "the number of steps goes where the optimizer has it"
    )


class Parted(torch.Tensor):
    """Stands for a tensor of which each process has a part."""

    def to_local(self):
        return self.as_subclass(torch.Tensor)


def test_of_what_is_in_parts_each_process_gives_its_own(monkeypatch):
    policy = line_policy()
    strategy = descending(policy)
    part = torch.tensor([2.0]).as_subclass(Parted)
    strategy.optimizer.state[policy.trained["a"]] = {"m": part, "step": 3}
    strategy.layout.piece = lambda parameter, held: Piece(held, torch.Size([2]), 1)
    m, step = strategy.moments("a").values()
    assert (m.values.tolist(), m.start, m.end, m.everywhere) == ([2], 1, 2, False)
    assert (step.values.tolist(), step.start, step.everywhere) == (3, 0, True)
    norm = SimpleNamespace(full_tensor=lambda: torch.tensor(7.0))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, most: norm)
    assert strategy.step(1.0) == 7


def test_a_layout_of_whole_weights_gives_and_takes_them_as_they_are(monkeypatch):
    layout, parameter = Layout(), torch.nn.Parameter(torch.ones(2, 3))
    value = torch.zeros(2, 3)
    assert layout.shape(parameter) == (2, 3)
    held = layout.local(parameter)
    assert (held.data_ptr(), held.requires_grad) == (parameter.data_ptr(), False)
    assert layout.gathered(parameter, value) is value
    assert layout.shard(parameter, value) is value
    assert layout.shard(torch.nn.Parameter(torch.ones(1, device="meta")), value).device.type == "meta"
    assert (layout.sharded, layout.offloaded) == (False, False)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    layout.synchronize()
    layout.mark_written()
    assert waited == []
    layout.offloaded = True
    layout.synchronize()
    assert waited == [1]


def test_a_strategy_tells_its_layout_of_writing_and_lets_the_model_go():
    policy = Policy(Line())
    strategy = descending(policy)
    written = []
    strategy.layout.mark_written = lambda: written.append(1)
    strategy.mark_loaded()
    assert written == [1]
    policy.model.module = "wrapped"
    strategy.begin_micro_batch(last=True)
    strategy.close()
    assert policy.model.module is policy.model.transformer


def test_a_strategy_of_its_own_runs_the_backward_and_may_be_compiled():
    class Plain(Strategy):
        zero_grad = step = moments = load_moments = None

    policy = line_policy(3)
    strategy = Plain(policy, ALONE)
    strategy.backward(2 * policy.trained["a"].sum())
    assert policy.trained["a"].grad.item() == 2
    assert (strategy.compiles, strategy.repeatable) == (True, False)


def test_what_a_parallel_block_says_by_default():
    class Plain(Parallel):
        strategy: str = "plain"

        def prepare(self, policy, settings, world):
            raise AssertionError("not in this test")

    plain = Plain()
    assert plain.lowers
    assert (plain.needs_group, plain.problem(9), plain.label(9)) == (False, None, "plain")
    assert plain.shares(9) == Shares()


def test_single_is_one_process():
    assert Single().problem(1) is None
    assert Single().problem(2) == "single is one process, not 2"
    assert Single().strategy == "single"
