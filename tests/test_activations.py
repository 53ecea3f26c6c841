"""Recomputing activations changes no gradient."""

import pytest
import torch
from pipelines import load

from posttrain.policy import Policy
from posttrain.policy.activations import checkpoint_blocks
from posttrain.policy.tuning import Full, Lora
from posttrain.sampling.prompts import encode


@pytest.mark.parametrize("tune", [Full(), Lora(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_checkpointing_changes_no_gradient(tune, autocast):
    model = load()
    tune.apply(model.transformer, 0)
    policy = Policy(model, autocast=autocast)
    conditions, rows = encode(model, ["a red circle", "a blue square"] * 2)
    latents = torch.randn(4, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 0.9, 4)
    gradients = {}
    for mode in ("off", "selective", "full"):
        checkpoint_blocks(model.transformer, mode)
        for parameter in policy.trained.values():
            parameter.grad = None
        policy.velocity(latents, sigma, conditions.rows(rows)).square().mean().backward()
        gradients[mode] = torch.cat([p.grad.flatten() for p in policy.trained.values()])
    assert gradients["off"].abs().max() > 0
    assert torch.equal(gradients["off"], gradients["selective"])
    assert torch.equal(gradients["off"], gradients["full"])
