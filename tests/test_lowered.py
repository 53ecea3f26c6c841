"""What autocast keeps of lowered weights is kept in a block, and forgotten where it would be wrong."""

import pytest
import torch
from lines import line_policy
from stored import stored

from posttrain.parallel.strategy import Layout


@pytest.mark.parametrize(
    ("autocast", "sharded", "kept"),
    [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (None, False, False)],
)
def test_only_whole_weights_under_autocast_are_kept_lowered(autocast, sharded, kept, monkeypatch):
    cleared = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(1))
    policy = line_policy(autocast=autocast)
    policy.layout = type("Sharded", (Layout,), {"sharded": sharded})()
    with policy.casts_kept():
        for _ in range(2):
            with policy.casts_kept():
                assert (torch.autocast_decrement_nesting() > 0) is kept
                torch.autocast_increment_nesting()
        assert cleared == [], "the outermost block alone forgets"
    assert len(cleared) == kept
    torch.autocast_increment_nesting()
    assert torch.autocast_decrement_nesting() == 0


def test_what_was_lowered_is_forgotten_where_the_kind_of_gradient_or_the_weights_change(monkeypatch):
    cleared = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(1))
    policy = line_policy()
    policy.add_role("old")
    counts = []
    for gradients in (False, False, True, True, False):
        with torch.set_grad_enabled(gradients):
            policy.velocity(torch.ones(1, 1), torch.zeros(1), {"c": torch.zeros(1)})
        counts.append(len(cleared))
        cleared.clear()
    assert counts == [1, 1, 2, 1, 2], "autocast itself forgets once a forward"
    with policy.using("old"):
        assert len(cleared) == 1
    assert len(cleared) == 2


def test_what_was_lowered_for_a_repeated_velocity_is_kept_for_the_loss_of_compiled_blocks(monkeypatch):
    cleared = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(1))
    policy = line_policy()
    policy.compiled = True
    counts = []
    for gradients, repeated in ((False, True), (True, False), (False, True), (False, False), (False, True)):
        with torch.set_grad_enabled(gradients):
            policy.velocity(torch.ones(1, 1), torch.zeros(1), {"c": torch.zeros(1)}, repeated=repeated)
        counts.append(len(cleared))
        cleared.clear()
    assert counts == [2, 1, 1, 2, 2], "autocast itself forgets once a forward"


def test_trained_weights_and_frozen_fractions_are_lowered_and_frozen_whole_numbers_stay():
    policy = line_policy(autocast=torch.bfloat16)
    policy.model.transformer.table = torch.nn.Parameter(torch.tensor([2**20 + 1]), requires_grad=False)
    policy.find_parameters()
    policy.lower()
    dtypes = {name: p.dtype for name, p in policy.model.transformer.named_parameters()}
    assert dtypes == {"a": torch.bfloat16, "b": torch.bfloat16, "table": torch.int64}
    assert policy.model.transformer.table.tolist() == [2**20 + 1]


def test_a_role_that_is_loaded_leaves_the_weights_that_are_in_use():
    policy = line_policy(2, autocast=torch.bfloat16)
    policy.lower()
    policy.add_role("old", {"a": torch.tensor([5.0])})
    policy.add_role("ema")
    low = policy.masters.copies["a"]
    with policy.using("old"):
        policy.load("ema", {"a": stored(torch.tensor([6.0]))})
        assert low.item() == 5
    assert (low.item(), policy.roles["ema"]["a"].item()) == (2, 6)
    policy.load(None, {"a": stored(torch.tensor([7.0]))})
    assert low.item() == 7
