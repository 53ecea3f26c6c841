"""Diffusion-DPO's formulas reproduce the recorded numbers of a published implementation."""

import ast

import pytest
import torch
from by_hand import Given
from parity_vectors import assert_close, ids, of_kind
from test_parity_online import conditions_of, policy_of

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms.dpo import DPO


@pytest.mark.parametrize("v", of_kind("dpo_step"), ids=ids)
def test_parity_dpo_step(v, monkeypatch):
    policy, dpo = policy_of(v, reference="ref_weight."), DPO(beta=v.number("beta"))
    config, n = ast.literal_eval(v.meta["config"]), len(v["chosen"])
    null = torch.zeros(1, v["prompt_embeds"].shape[1], config["joint_attention_dim"])
    conditions = conditions_of(v, null, torch.zeros(1, config["pooled_projection_dim"]))
    batch = Batch(v["chosen"], torch.arange(1, n + 1), conditions, fields={"rejected": v["rejected"]})
    items = collected(dpo, batch, policy, v, monkeypatch)
    assert_close(items.reference_loss, v["ref_chosen_error"], 1e-4)
    assert_close(items.rejected_reference_loss, v["ref_rejected_error"], 1e-4)
    losses = dpo.loss(items, policy)
    losses.per_item.mean().backward()
    assert_close(losses.metrics["chosen_loss"], v["chosen_error"], 1e-4)
    assert_close(losses.metrics["rejected_loss"], v["rejected_error"], 1e-4)
    assert_close(losses.metrics["margin"], v["margin"], 1e-4)
    assert_close(losses.per_item.mean(), v["loss"], 1e-4)
    assert_close(losses.metrics["accuracy"], (v["margin"] > 0).float(), 0.0)
    for name, gradient in v.under("grad.").items():
        assert_close(policy.parameters[name].grad, gradient, 1e-4)
    norm = torch.stack([p.grad.norm() for p in policy.trained.values() if p.grad is not None]).norm()
    assert_close(norm, v["grad_norm"], 1e-4)


@pytest.mark.parametrize("v", of_kind("dpo_step"), ids=ids)
def test_parity_dpo_margin_and_loss_of_the_recorded_errors(v, monkeypatch):
    dpo, n = DPO(beta=v.number("beta")), len(v["chosen"])
    errors = (v["chosen_error"], v["rejected_error"])
    monkeypatch.setattr(DPO, "losses", lambda *_: errors)
    fields = {"reference_loss": v["ref_chosen_error"], "rejected_reference_loss": v["ref_rejected_error"]}
    index = {"prompt_index": torch.arange(n), "sample_index": torch.arange(n)}
    losses = dpo.loss(Items(torch.ones(n), fields | index, None), None)
    assert_close(losses.metrics["margin"], v["margin"], 1e-5)
    assert_close(losses.per_item.mean(), v["loss"], 1e-5)


def collected(dpo, batch, policy, v, monkeypatch):
    """The items that ``collect`` makes of the recorded noise and sigmas."""
    monkeypatch.setattr(policy.model, "sigma", lambda t, size: v["sigmas"], raising=False)
    with torch.no_grad():
        return dpo.collect(batch, Tools(policy, Given((0,), range(len(batch)), values={"noise": v["noise"]})))
