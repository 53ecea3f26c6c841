"""Laws that every algorithm keeps; a new file in algorithms/ is tested the moment it exists."""

import pickle

import pytest
import torch
from toys import alone, toy_batch, toy_policy

from posttrain.algorithm import Algorithm, Tools
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR
from posttrain.engine.rehearsal import rehearse
from posttrain.engine.trainer import update
from posttrain.optim.settings import Train
from posttrain.registry import discover

ALL = sorted(discover(Algorithm, "posttrain.algorithms"))
OFFLINE = [name for name in ALL if Algorithm.variants[name].needs == "images"]


def collected(algorithm, policy, **kwargs):
    batch, draws = toy_batch(policy.model, **kwargs)
    for role in algorithm.roles:
        policy.add_role(role)
    with torch.no_grad():
        return algorithm.collect(batch, Tools(policy, draws))


def gradient(algorithm, micro_batch, **kwargs):
    policy = toy_policy()
    items = collected(algorithm, policy, **kwargs)
    settings, policy.micro_batch = Train(steps=1, max_grad_norm=1e9), micro_batch
    strategy = alone(policy)
    update(algorithm, policy, items, strategy, settings, 1)
    return torch.cat([gradient.flatten() for gradient in strategy.optimizer.seen])


@pytest.mark.parametrize("name", OFFLINE)
def test_the_gradient_does_not_depend_on_the_micro_batch(name):
    algorithm = Algorithm.variants[name]()
    whole = gradient(algorithm, 1000)
    assert whole.abs().max() > 1e-3
    for size in (1, 5):
        torch.testing.assert_close(gradient(algorithm, size), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OFFLINE)
def test_all_randomness_is_in_collect_and_comes_from_the_draws(name):
    algorithm = Algorithm.variants[name]()
    torch.manual_seed(1)
    policy = toy_policy()
    items = collected(algorithm, policy)
    state = torch.get_rng_state()
    first, second = (algorithm.loss(items, policy).per_item for _ in range(2))
    assert torch.equal(first, second)
    again = collected(algorithm, policy)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(items.fields[k], again.fields[k]) for k in items.fields)
    other = collected(algorithm, policy, step=1)
    assert not torch.equal(items.latents, other.latents)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_sample_draws_the_same_in_any_batch(name):
    algorithm, policy = Algorithm.variants[name](), toy_policy()
    big, small = collected(algorithm, policy, n=6), collected(algorithm, policy, n=4)
    per_sample = len(big) // 6
    assert per_sample == rehearse(algorithm).items
    rows = torch.cat([torch.arange(4) + 6 * i for i in range(per_sample)])
    torch.testing.assert_close(big.take(rows).latents, small.latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OFFLINE)
def test_forward_equivalents_are_what_the_plan_says(name):
    algorithm, policy = Algorithm.variants[name](), toy_policy()
    items = collected(algorithm, policy)
    algorithm.loss(items, policy)
    assert policy.forward_equivalents == 6 * rehearse(algorithm).forward_equivalents


@pytest.mark.parametrize("name", ALL)
def test_a_spec_survives_its_dump_and_pickle(name):
    algorithm = Algorithm.variants[name]()
    assert pickle.loads(pickle.dumps(algorithm)) == algorithm
    assert type(algorithm).model_validate(algorithm.model_dump()) == algorithm


@pytest.mark.parametrize("settings", [{"lambda_aux": 0.0}, {"trajectory_length": 0}])
def test_soar_without_auxiliary_points_is_sft_to_the_bit(settings):
    assert torch.equal(gradient(SOAR(**settings), 2), gradient(SFT(), 2))
    soar, sft = collected(SOAR(**settings), toy_policy()), collected(SFT(), toy_policy())
    assert all(torch.equal(soar.fields[k], sft.fields[k]) for k in sft.fields)


def test_soar_shares_its_base_items_with_sft():
    soar, sft = collected(SOAR(), toy_policy()), collected(SFT(), toy_policy())
    assert torch.equal(soar.latents[:6], sft.latents)


def test_the_published_normaliser_is_the_sum_of_weights():
    items = collected(SOAR(lambda_aux=0.5, trajectory_length=3), toy_policy())
    assert items.weight.sum().item() == 6 + 0.5 * 3 * 6


@pytest.mark.parametrize("dynamics", ["flow_sde", "sde", "cps", "simple"])
def test_every_stochastic_path_is_finite_and_differs_from_the_ode(dynamics):
    soar = SOAR(num_rollout_paths=2, trajectory_length=1, sde_rollout_type=dynamics, num_sampling_steps=4)
    items = collected(soar, toy_policy())
    assert all(bool(v.isfinite().all()) for v in items.fields.values())
    assert not torch.equal(items.latents[6:12], items.latents[12:18])


def test_a_path_that_would_start_at_the_image_keeps_the_ode_point_only():
    soar = SOAR(num_rollout_paths=2, trajectory_length=1, num_sampling_steps=1)  # t1 = 0 for every sample
    items = collected(soar, toy_policy())
    assert items.weight.tolist() == [1] * 12 + [0] * 6
    assert bool(items.latents.isfinite().all())


def test_condition_dropout_is_per_sample_and_leaves_the_rollout_its_prompt():
    dropped = collected(SOAR(cond_dropout=0.5, trajectory_length=1), toy_policy(), n=40)
    kept = collected(SOAR(cond_dropout=0.0, trajectory_length=1), toy_policy(), n=40)
    share = (dropped.prompt_index[:40] == 0).float().mean().item()
    assert 0.2 < share < 0.8
    assert torch.equal(dropped.prompt_index[:40], dropped.prompt_index[40:])
    assert torch.equal(dropped.latents, kept.latents)


def test_the_sigma_floor_bounds_every_auxiliary_sigma():
    items = collected(SOAR(sigma_floor=0.5), toy_policy())
    assert items.sigma[6:].min() >= 0.5
    assert items.sigma[:6].min() < 0.5


def test_ode_only_soar_learns_the_flow_of_a_point_mass():
    """With one image the optimal velocity at (x, sigma) is (x - x0) / sigma, at auxiliary points too."""
    policy, soar = toy_policy(), SOAR(trajectory_length=2, sigma_floor=0.1)
    strategy = alone(policy, torch.optim.Adam, lr=3e-3)
    settings, losses = Train(steps=400), []
    for step in range(400):
        batch, draws = toy_batch(policy.model, n=32, step=step)
        point = type(batch)(torch.full_like(batch.latents, 0.5), batch.prompt_index, batch.conditions)
        with torch.no_grad():
            items = soar.collect(point, Tools(policy, draws))
        losses.append(update(soar, policy, items, strategy, settings, step)["loss"].item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
