"""What autocast keeps of lowered weights is kept in a block, and forgotten where it would be wrong."""

import pytest
import torch
from lines import line_policy

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
