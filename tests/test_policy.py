"""Under autocast weights are lowered once for many forwards, and again whenever they changed."""

import contextlib

import pytest
import torch
from pipelines import load
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.algorithm import Tools
from posttrain.algorithms.soar import SOAR
from posttrain.data.batches import encoded
from posttrain.data.loader import ImageBatch
from posttrain.distributed.world import ALONE
from posttrain.engine.trainer import update
from posttrain.flow.sampling_settings import Sampling
from posttrain.models.sd3 import SD3
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.policy import Policy
from posttrain.policy.tuning import Full
from posttrain.sampling.prompts import encode
from posttrain.sampling.sampler import FlowSampler, flow_sampler
from posttrain.support.randomness import Draws


class Lowered(TorchDispatchMode):
    """Counts the weights that are made bf16."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.count += out.dtype == torch.bfloat16
        return out


@pytest.fixture
def policy():
    model = load()
    Full().apply(model.transformer, 0)
    return Policy(model, autocast=torch.bfloat16, micro_batch=2)


def forwards(policy):
    """Velocities and a gradient, of the weights and of a role, with and without gradients."""
    model = policy.model
    conditions, rows = encode(model, ["a red circle"] * 2)
    latents, sigma = torch.ones(2, *model.latent_shape(16, 16)), torch.full((2,), 0.5)
    found = []
    model.transformer.zero_grad()
    for factor in (1.0, 2.0):
        with torch.no_grad():
            found.append(policy.velocity(latents * factor, sigma, conditions.rows(rows)))
        with policy.using("old"):
            found.append(policy.velocity(latents * factor, sigma, conditions.rows(rows)))
        for _ in range(2):
            policy.velocity(latents * factor, sigma, conditions.rows(rows)).square().mean().backward()
    found.append(torch.cat([p.grad.flatten() for p in policy.trained.values() if p.grad is not None]))
    return found


def test_what_is_kept_changes_no_bit_of_weights_roles_and_gradients(policy):
    policy.add_role("old", {n: 1.1 * p.detach() for n, p in policy.trained.items()})
    plain = forwards(policy)
    with policy.casts_kept():
        kept = forwards(policy)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert not torch.equal(plain[0], plain[1])
    assert len(plain[-1]) == sum(p.numel() for p in policy.trained.values())
    assert plain[-1].abs().max() > 0


@pytest.mark.parametrize(("steady", "times"), [(True, 2), (False, 6)])
def test_weights_are_lowered_once_for_forwards_of_a_kind(policy, steady, times):
    conditions, rows = encode(policy.model, ["a red circle"])
    latents, sigma = torch.ones(1, *policy.model.latent_shape(16, 16)), torch.full((1,), 0.5)

    def forward():
        return policy.velocity(latents, sigma, conditions.rows(rows))

    with Lowered() as once:
        forward()
    with policy.casts_kept() if steady else contextlib.nullcontext(), Lowered() as seen:
        with torch.no_grad():
            for _ in range(3):
                forward()
        for _ in range(3):
            forward().sum().backward()
    assert once.count > 30
    assert seen.count == times * once.count


def test_an_evaluation_lowers_no_weight_while_it_draws():
    """Its weights are lowered before, and its images are those of a policy that lowers them by autocast."""
    spec, settings = SD3(path="unused"), Sampling(resolution=16, steps=3, guidance=2.0, precision="bf16")
    sampler = flow_sampler(load(), spec, settings, "here")
    with Lowered() as seen:
        images = sampler.images(["a red circle"], [0], settings)
    assert not images.requires_grad
    assert seen.count == 0
    trained = FlowSampler(Policy(load(), autocast=torch.bfloat16), "here", {})
    with Lowered() as seen:
        expected = trained.images(["a red circle"], [0], settings)
    assert seen.count > 30
    assert (images - expected).abs().mean() < 0.01


def test_steps_are_taken_on_the_weights_as_they_are(monkeypatch):
    """Two steps of SOAR, with and without what is kept."""
    found = []
    for keeps in (True, False):
        model = load()
        Full().apply(model.transformer, 0)
        policy = Policy(model, autocast=torch.bfloat16, micro_batch=3)
        if not keeps:
            monkeypatch.setattr(Policy, "casts_kept", lambda self: contextlib.nullcontext())
        strategy = Single().prepare(policy, settings := Train(steps=2, learning_rate=1e-3), ALONE)
        draws = Draws((0, 0, 0), range(4))
        images = ImageBatch(
            0, 0, [0, 1, 2, 3], torch.zeros(4, 3, 16, 16), ["a red circle"] * 4, [0, 1, 2, 3], (16, 16)
        )
        batch, soar = encoded(images, model, draws), SOAR(trajectory_length=2)
        for _ in range(2):
            with torch.no_grad(), policy.casts_kept():
                items = soar.collect(batch, Tools(policy, draws))
            update(soar, policy, items, strategy, settings)
        found.append(torch.cat([p.detach().flatten() for p in policy.trained.values()]))
    assert torch.equal(*found)
    assert not torch.equal(
        found[0], torch.cat([p.detach().flatten() for p in load().transformer.parameters()])
    )
