"""Roles of weights, and what a forward of the policy is given and costs: numbers by hand on two weights."""

import pytest
import torch
from lines import line_policy
from stored import stored

from posttrain.condition import Conditions
from posttrain.parallel.strategy import Layout
from posttrain.policy import Policy
from posttrain.policy.piece import Piece

CONDITIONS = Conditions({"c": torch.tensor([-1.0, 10.0, 20.0])})


def value(policy, role=None):
    return {
        name: policy.whole_weight(role, name).item()
        for name in (policy.roles[role] if role else policy.trained)
    }


def test_a_policy_begins_with_nothing_but_its_weights():
    policy = line_policy(2, 3)
    assert Policy(policy.model).micro_batch == 64
    assert (policy.autocast, policy.roles, policy.static) == (None, {}, set())
    assert (policy.forward_equivalents, policy.largest_forward) == (0, 0)
    assert list(policy.parameters) == ["a", "b"]
    assert list(policy.trained) == ["a"]
    assert type(policy.layout) is Layout


def test_a_role_is_a_copy_of_the_trained_weights_alone():
    policy = line_policy(2)
    policy.add_role("ema")
    policy.add_role("reference", moves=False)
    policy.trained["a"].data.fill_(7)
    assert value(policy, "ema") == value(policy, "reference") == {"a": 2}
    assert value(policy) == {"a": 7}
    assert policy.static == {"reference"}
    assert not policy.roles["ema"]["a"].requires_grad


def test_a_role_may_hold_other_weights_and_of_what_is_not_trained():
    policy = line_policy(2, 3)
    policy.add_role("other", {"b": torch.tensor([5.0])})
    assert value(policy, "other") == {"b": 5}
    with policy.using("other"):
        assert (policy.parameters["a"].item(), policy.parameters["b"].item()) == (2, 5)
    assert policy.parameters["b"].item() == 3


@pytest.mark.parametrize(("decay", "after"), [(0.75, 4), (0.25, 8), (1.0, 2), (0.0, 10)])
def test_a_role_keeps_its_decay_and_takes_the_rest_of_the_trained(decay, after):
    policy = line_policy(2)
    policy.add_role("ema")
    policy.add_role("old")
    policy.trained["a"].data.fill_(10)
    kept = policy.roles["ema"]["a"]
    policy.move_role("ema", decay)
    assert value(policy, "ema") == {"a": after}
    assert kept is policy.roles["ema"]["a"]
    assert (value(policy, "old"), value(policy)) == ({"a": 2}, {"a": 10})


def test_within_using_the_role_answers_without_gradients_and_changes_places():
    policy = line_policy(2)
    policy.add_role("old")
    policy.trained["a"].data.fill_(9)
    parameter, kept = policy.trained["a"], policy.roles["old"]["a"]
    with policy.using("old"):
        assert not torch.is_grad_enabled()
        assert (policy.parameters["a"].item(), kept.item()) == (2, 9)
    assert (parameter.item(), kept.item()) == (9, 2)
    assert policy.parameters["a"] is parameter
    assert torch.is_grad_enabled()
    with policy.using(None):
        assert not torch.is_grad_enabled()
        assert parameter.item() == 9


def test_a_role_goes_out_again_where_the_block_fails():
    policy = line_policy(2)
    policy.add_role("old", {"a": torch.tensor([5.0])})
    with pytest.raises(RuntimeError), policy.using("old"):
        raise RuntimeError
    assert (value(policy), value(policy, "old")) == ({"a": 2}, {"a": 5})


def test_a_role_of_nothing_is_the_model_itself():
    policy = line_policy(2)
    policy.add_role("reference", {})
    with policy.using("reference"):
        assert not torch.is_grad_enabled()
        assert policy.parameters["a"].item() == 2


def test_roles_of_weights_of_several_sizes_and_types_change_places():
    policy = line_policy()
    module = policy.model.transformer
    module.wide = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    module.low = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    policy.find_parameters()
    assert list(policy.trained) == ["a", "wide", "low"]
    policy.add_role("old", {n: p.detach() + 1 for n, p in policy.trained.items()})
    before = {n: p.detach().clone() for n, p in policy.trained.items()}
    for _ in range(2):
        with policy.using("old"):
            assert all(torch.equal(p, before[n] + 1) for n, p in policy.trained.items())
        assert all(torch.equal(p, before[n]) for n, p in policy.trained.items())


class Noting(Layout):
    """Holds the negative of a part; notes when writing begins and ends."""

    def __init__(self):
        self.calls = []

    def shard(self, parameter, whole):
        return -whole

    def gathered(self, parameter, held):
        return -held

    def piece(self, parameter, held):
        return Piece(held, torch.Size([2]), start=1)

    def synchronize(self):
        self.calls.append("settle")

    def mark_written(self):
        self.calls.append("written")


def test_a_layout_cuts_what_comes_in_joins_what_goes_out_and_is_told_of_writing():
    policy = line_policy(2)
    policy.layout = Noting()
    policy.add_role("own")
    policy.add_role("given", {"a": torch.tensor([5.0])})
    assert [policy.roles[n]["a"].item() for n in ("own", "given")] == [2, -5]
    assert (value(policy), value(policy, "given")) == ({"a": -2}, {"a": 5})
    assert policy.layout.calls == []
    policy.load("own", {"a": stored(torch.tensor([0, 3.0]))})
    policy.load(None, {"a": stored(torch.tensor([0, 4.0]))})
    assert (policy.roles["own"]["a"].item(), policy.trained["a"].item()) == (3, 4)
    assert policy.layout.calls == ["settle"] * 2
    with policy.using("own"):
        assert policy.layout.calls == ["settle"] * 3 + ["written"]
    assert policy.layout.calls == ["settle"] * 3 + ["written", "settle", "written"]


def test_loading_a_role_leaves_the_trained_weights():
    policy = line_policy(2)
    policy.add_role("ema")
    policy.load("ema", {"a": stored(torch.tensor([6.0]))})
    assert (value(policy), value(policy, "ema")) == ({"a": 2}, {"a": 6})
    policy.load(None, {"a": stored(torch.tensor([8.0]))})
    assert (value(policy), value(policy, "ema")) == ({"a": 8}, {"a": 6})
    assert policy.trained["a"].requires_grad


def forward(policy, rows, scale=None):
    latents = torch.arange(1.0, rows + 1).view(rows, 1, 1, 1)
    sigma = torch.arange(rows) / 8
    prompt = torch.arange(rows) % 2 + 1
    if scale is None:
        return policy.velocity(latents, sigma, CONDITIONS.rows(prompt)).flatten()
    return policy.guided_velocity(latents, sigma, prompt, CONDITIONS, scale).flatten()


def test_a_forward_costs_one_a_row_and_three_with_gradients():
    policy = line_policy(2)
    forward(policy, 5)
    assert (policy.forward_equivalents, policy.largest_forward) == (15, 5)
    with torch.no_grad():
        forward(policy, 3)
    assert (policy.forward_equivalents, policy.largest_forward) == (18, 5)


@pytest.mark.parametrize("scale", [None, 1, 3])
@pytest.mark.parametrize(
    ("gradients", "repeated", "compiled", "recorded"),
    [
        (False, False, True, False),
        (False, True, False, False),
        (False, True, True, True),
        (True, False, False, True),
        (True, True, True, True),
    ],
)
def test_a_compiled_velocity_that_the_loss_repeats_comes_from_the_losss_program(
    gradients, repeated, compiled, recorded, scale
):
    policy = line_policy(2, micro_batch=2)
    policy.compiled = compiled
    latents, prompt = torch.ones(2, 1, 1, 1), torch.tensor([1, 2])
    with torch.set_grad_enabled(gradients):
        if scale is None:
            found = policy.velocity(latents, torch.zeros(2), CONDITIONS.rows(prompt), repeated=repeated)
        else:
            found = policy.guided_velocity(
                latents, torch.zeros(2), prompt, CONDITIONS, scale, repeated=repeated
            )
        assert torch.is_grad_enabled() is gradients
    rows = 4 if scale == 3 else 2
    assert policy.model.seen == [(rows, recorded, None)]
    assert found.requires_grad is gradients, "what is not trained through keeps nothing for a backward"
    assert policy.forward_equivalents == rows * (3 if gradients else 1)


def test_a_policy_is_not_compiled_until_it_is_said():
    policy = line_policy(2)
    assert policy.compiled is False
    with torch.no_grad():
        policy.velocity(torch.ones(1, 1, 1, 1), torch.zeros(1), {"c": torch.zeros(1)}, repeated=True)
    assert policy.model.seen == [(1, False, None)]


def test_a_velocity_is_not_repeated_unless_it_is_said():
    policy = line_policy(2)
    policy.compiled = True
    with torch.no_grad():
        for scale in (None, 1, 3):
            forward(policy, 2, scale)
    assert [recorded for _, recorded, _ in policy.model.seen] == [False] * 3


# velocity = 2 x + c - sigma with c = 10, 20, 10, ... of the prompts and -1 of the empty one
CONDITIONAL = [2 * (i + 1) + (10, 20)[i % 2] - i / 8 for i in range(5)]
UNCONDITIONAL = [2 * (i + 1) - 1 - i / 8 for i in range(5)]


@pytest.mark.parametrize("gradients", [True, False])
def test_velocities_under_guidance_in_closed_form(gradients):
    with torch.set_grad_enabled(gradients):
        policy = line_policy(2, micro_batch=2)
        assert forward(policy, 5).tolist() == CONDITIONAL
        policy.model.seen.clear()
        assert forward(policy, 5, 1).tolist() == CONDITIONAL
        assert [rows for rows, *_ in policy.model.seen] == ([5] if gradients else [2, 2, 1])
        policy.model.seen.clear()
        found = forward(policy, 5, 3)
        assert found.tolist() == [u + 3 * (c - u) for c, u in zip(CONDITIONAL, UNCONDITIONAL, strict=True)]
        assert [rows for rows, *_ in policy.model.seen] == ([10] if gradients else [4, 4, 2])
        assert forward(policy, 5, 0).tolist() == UNCONDITIONAL
        assert found.requires_grad is gradients


def test_autocast_is_around_the_forward_alone_and_only_where_asked_for():
    for autocast in (None, torch.bfloat16, torch.float16):
        policy = line_policy(autocast=autocast)
        forward(policy, 1)
        assert policy.model.seen == [(1, True, autocast)]
        assert not torch.is_autocast_enabled("cpu")


def test_plain_weights_get_their_names_beside_adapters_that_add_nothing():
    policy = line_policy()
    module = policy.model.transformer
    module.q = torch.nn.Module()
    module.q.base_layer = torch.nn.Linear(2, 3, bias=False)
    module.q.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 1, bias=False)})
    module.q.lora_B = torch.nn.ModuleDict(
        {"default": torch.nn.Linear(1, 3, bias=False, dtype=torch.bfloat16)}
    )
    policy.find_parameters()
    given = {"a": torch.ones(1), "q.weight": torch.ones(3, 2)}
    named = policy.beside_adapters(given)
    assert set(named) == {"a", "q.base_layer.weight", "q.lora_B.default.weight"}
    assert named["a"] is given["a"]
    assert named["q.base_layer.weight"] is given["q.weight"]
    silent = named["q.lora_B.default.weight"]
    assert silent.shape == (3, 1)
    assert silent.dtype == torch.bfloat16
    assert not silent.any()
