"""DiffusionNFT's rollout, loss and old policy on a linear velocity, worked out in float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from by_hand import SHAPE, conditions, linear_policy, loss_of, near, per_item, velocity, wide

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms.diffusion_nft import DiffusionNFT, implicit_losses, old_decay, optimality
from posttrain.engine.rehearsal import rehearse
from posttrain.support.randomness import Draws

GRID = [1.0, 0.8, 0.5, 0.0]
N = 3


def nft(**settings):
    return DiffusionNFT(**{"num_steps": 3, "solver": "euler", **settings})


def batch():
    return Batch(torch.empty(N, *SHAPE, device="meta"), torch.tensor([1, 2, 3]), conditions())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("fraction", "count"), [(1.0, 3), (0.99, 2), (0.1, 1)])
def test_the_old_policy_draws_samples_that_are_noised_again(guidance, fraction, count):
    algorithm = nft(guidance_scale=guidance, timestep_fraction=fraction)
    policy, draws = linear_policy(9.0, old=0.5, reference=-9.0), Draws((0,), range(30, 30 + N))
    with torch.no_grad():
        found, fields = algorithm.rollout(batch(), Tools(policy, draws, lambda steps: GRID[: steps + 1]))
    x = draws.normal("initial", SHAPE).double()
    for s, t in pairwise(GRID):
        x = x + (t - s) * velocity(0.5, x, torch.full((N,), s), batch().prompt_index, guidance)
    near(found, x)
    assert sorted(fields) == ["latents", "prompt_index", "sigma", "x0"]
    times, noise = draws.permutations("times", 3), draws.normal("noise", (count, *SHAPE)).double()
    for k in range(count):
        sigma = torch.tensor(GRID)[times[:, k]]
        near(fields["sigma"][:, k], sigma)
        near(fields["x0"][:, k], x)
        near(fields["latents"][:, k], (1 - wide(sigma)) * x + wide(sigma) * noise[:, k])
        assert fields["prompt_index"][:, k].tolist() == [1, 2, 3]
    assert fields["sigma"].shape == (N, count)
    assert rehearse(algorithm).items == count
    branches = 1 if guidance == 1 else 2
    assert policy.forward_equivalents == N * branches * 3
    # on each item: a forward and backward, the old policy's forward and the reference's
    assert rehearse(algorithm).forward_equivalents == branches * 3 + 5 * count
    without = nft(guidance_scale=guidance, timestep_fraction=fraction, kl_weight=0.0)
    assert rehearse(without).forward_equivalents == branches * 3 + 4 * count


def test_the_rollouts_solver_is_the_one_named():
    found = []
    for solver in ("euler", "dpm2"):
        algorithm, grid = nft(solver=solver), [1.0, 0.8, 0.4, 0.2]
        policy, draws = linear_policy(9.0, old=0.5, reference=0.0), Draws((0,), range(N))
        with torch.no_grad():
            found.append(algorithm.rollout(batch(), Tools(policy, draws, lambda _, grid=grid: grid))[0])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_all_samples_are_trained_on():
    mask = nft().trained_mask(torch.tensor([0.0, -1.0]))
    assert mask.tolist() == [True, True]
    assert mask.dtype == torch.bool


def items():
    x0 = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-0.3, 0.8]]).view(N, *SHAPE)
    x = torch.tensor([[1.0, 0.2], [-0.5, 0.4], [0.3, -2.0]]).view(N, *SHAPE)
    fields = {
        "latents": x, "x0": x0, "sigma": torch.tensor([0.9, 0.5, 0.2]), "advantage": torch.tensor([3.0, -1.0, 0.5]),
        "prompt_index": torch.tensor([1, 2, 3]), "sample_index": torch.arange(N),
    }  # fmt: skip
    return Items(torch.ones(N), fields, conditions())


def expected(w, w_old, beta):
    """r, the two implicit losses and the velocities' distance, in float64, at clip 5 and mode "all"."""
    i = items()
    v, v_old = (velocity(number, i.latents, i.sigma, i.prompt_index) for number in (w, w_old))
    parts = []
    for mixed in (beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v):
        error = i.latents.double() - wide(i.sigma) * mixed - i.x0.double()
        parts.append(per_item(error**2) / per_item(error.abs()))
    r = torch.tensor([0.8, 0.4, 0.55], dtype=torch.float64)
    return r, *parts, per_item((v - v_old) ** 2)


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_loss(kl_weight, beta):
    algorithm = nft(kl_weight=kl_weight, beta=beta)
    policy = linear_policy(0.6, old=0.4, reference=-0.2)
    losses = loss_of(algorithm, items(), policy)
    r, positive, negative, moved = expected(0.6, 0.4, beta)
    policy_loss = 5 / beta * (r * positive + (1 - r) * negative)
    i = items()
    kl = per_item(
        (
            velocity(0.6, i.latents, i.sigma, i.prompt_index)
            - velocity(-0.2, i.latents, i.sigma, i.prompt_index)
        )
        ** 2
    )
    near(losses.per_item, policy_loss + kl_weight * kl)
    metrics = {
        "policy_loss": policy_loss, "positive_loss": positive, "negative_loss": negative, "optimality": r,
        "old_distance": moved,
    } | ({"kl": kl} if kl_weight else {})  # fmt: skip
    assert sorted(losses.metrics) == sorted(metrics)
    for name, value in metrics.items():
        near(losses.metrics[name], value)
        assert losses.metrics[name].dtype == torch.float32
    assert policy.forward_equivalents == N * (3 + 1 + bool(kl_weight))


class Counted:
    """How often the roles' weights came in."""

    def __init__(self, policy, monkeypatch):
        self.uses, using = [], policy.using
        monkeypatch.setattr(policy, "using", lambda name: self.uses.append(name) or using(name))


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_what_training_does_not_change_is_computed_once(monkeypatch, kl_weight):
    algorithm = nft(kl_weight=kl_weight)
    policy = linear_policy(0.6, micro_batch=2, old=0.4, reference=-0.2)
    some = replace(items(), weight=torch.tensor([1.0, 0.0, 2.0]))
    counted, repeats, velocity_of = Counted(policy, monkeypatch), [], policy.velocity
    monkeypatch.setattr(
        policy,
        "velocity",
        lambda *given, repeated=False: repeats.append(repeated) or velocity_of(*given, repeated=repeated),
    )
    with torch.no_grad():
        found = algorithm.with_frozen_velocities(some, policy)
    assert repeats == [True] * (1 + bool(kl_weight)), "each is compared with the loss's own"
    roles = {"old": 0.4} | ({"reference": -0.2} if kl_weight else {})
    assert counted.uses == list(roles)
    assert policy.forward_equivalents == 2 * len(roles)
    for role, w in roles.items():
        expected = velocity(w, some.latents, some.sigma, some.prompt_index)
        expected[1] = 0  # of weight 0: never trained
        near(found.fields[f"{role}_velocity"], expected)
    assert ("reference_velocity" in found.fields) == bool(kl_weight)
    algorithm.loss(found.take(slice(0, 1)), policy)
    assert counted.uses == list(roles)


def test_every_process_computes_as_many_items_as_the_one_that_trains_most():
    class Two:
        def max(self, value):
            return max(value, most)

    algorithm, policy = nft(kl_weight=0.0), linear_policy(0.6, old=0.4)
    some = replace(items(), weight=torch.tensor([0.0, 1.0, 0.0]))
    for most in (2, 0, 3):
        policy.forward_equivalents = 0
        found = algorithm.with_frozen_velocities(some, policy, Two())
        assert policy.forward_equivalents == max(most, 1)
        near(found.old_velocity[1], velocity(0.4, some.latents, some.sigma, some.prompt_index)[1])
    none, most = replace(some, weight=torch.zeros(N)), 0
    assert algorithm.with_frozen_velocities(none, policy, Two()) is none


def test_the_gradient_flows_through_the_trained_velocity_and_not_through_the_scale():
    policy, (grad_at, h) = linear_policy(0.6, old=0.4, reference=-0.2), (0.6, 1e-4)
    loss_of(nft(kl_weight=0.0, beta=0.5), items(), policy).per_item.sum().backward()
    i = items()

    def loss(w, frozen):
        """The squared errors of ``w`` over the scales of ``frozen``."""
        total = 0
        v, v_old = (velocity(n, i.latents, i.sigma, i.prompt_index) for n in (w, 0.4))
        at = velocity(frozen, i.latents, i.sigma, i.prompt_index)
        r = torch.tensor([0.8, 0.4, 0.55], dtype=torch.float64)
        for sign, share in ((1, r), (-1, 1 - r)):
            errors = [
                i.latents.double() - wide(i.sigma) * (v_old + sign * 0.5 * (u - v_old)) - i.x0.double()
                for u in (v, at)
            ]
            total = total + (10 * share * per_item(errors[0] ** 2) / per_item(errors[1].abs())).sum()
        return total

    slope = (loss(grad_at + h, grad_at) - loss(grad_at - h, grad_at)) / (2 * h)
    assert policy.model.transformer.w.grad.item() == pytest.approx(slope.item(), rel=1e-3)


@pytest.mark.parametrize("clip", [5.0, 2.0])
def test_optimality(clip):
    a = torch.tensor([-9.0, -1.0, 0.0, 0.5, 1.5, 9.0])
    half = 1 / (2 * clip)
    expected = {
        "all": [0, 0.5 - half, 0.5, 0.5 + 0.5 * half, 0.5 + 1.5 * half, 1],
        "positive_only": [0.5, 0.5, 0.5, 0.5 + 0.5 * half, 0.5 + 1.5 * half, 1],
        "negative_only": [0, 0.5 - half, 0.5, 0.5, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.5 + half, 0.5 + half, 0.5 + half],
        "binary": [0.5 - half, 0.5 - half, 0.5, 0.5 + half, 0.5 + half, 0.5 + half],
    }
    for mode, values in expected.items():
        near(optimality(a, mode, clip), values)
    assert optimality(torch.tensor([0.3]), "binary", 0.25).item() == 1  # a sign may exceed the clip
    assert optimality(torch.tensor([-0.3]), "binary", 0.25).item() == 0


def test_the_loss_takes_the_mode_and_the_clip_from_the_recipe():
    losses = loss_of(
        nft(adv_mode="binary", adv_clip_max=2.0), items(), linear_policy(0.6, old=0.4, reference=0.0)
    )
    r, positive, negative, _ = expected(0.6, 0.4, 0.1)
    r = torch.tensor([0.75, 0.25, 0.75], dtype=torch.float64)
    near(losses.metrics["optimality"], r)
    near(losses.metrics["policy_loss"], 2 / 0.1 * (r * positive + (1 - r) * negative))


def test_an_error_of_nothing_has_a_scale_of_its_own():
    x0, v = torch.zeros(2, 4), torch.full((2, 4), 1e-7)
    v[1] = 1e-4
    found, _ = implicit_losses(v, v, x0, x0, torch.ones(2), 0.3)
    assert found.dtype == torch.float64
    near(found, [1e-14 / 1e-5, 1e-4], rtol=1e-4, atol=0)


def test_how_slowly_the_old_policy_follows():
    assert [old_decay(0, s) for s in (0, 1, 500)] == [0, 0, 0]
    assert [old_decay(1, s) for s in (1, 100, 499, 501, 2000)] == pytest.approx([0.001, 0.1, 0.499, 0.5, 0.5])
    assert [old_decay(2, s) for s in (1, 74, 75, 76, 208, 209, 999)] == pytest.approx(
        [0, 0, 0, 0.0075, 0.9975, 0.999, 0.999]
    )
    for decay_type, after in ((0, 0.6), (1, 0.1 * 0.4 + 0.9 * 0.6), (2, 0.1875 * 0.4 + 0.8125 * 0.6)):
        policy = linear_policy(0.6, old=0.4, reference=-1.0)
        nft(decay_type=decay_type).after_batch(policy, 100)
        assert policy.roles["old"]["w"].item() == pytest.approx(after)
        assert policy.roles["reference"]["w"].item() == -1
        assert policy.model.transformer.w.item() == pytest.approx(0.6)
