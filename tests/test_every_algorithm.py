"""Laws that every algorithm keeps; a new file in algorithms/ is tested the moment it exists."""

import pytest
import torch
from toys import alone, collected, gradient, toy_batch, toy_policy

from posttrain.algorithm import Algorithm, Tools
from posttrain.algorithms.reflexflow import ReflexFlow
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR
from posttrain.engine.trainer import update
from posttrain.optim.settings import Train
from posttrain.registry import discover
from posttrain.testing import AlgorithmLaws

SMALL = {"group_size": 4, "num_steps": 4}
"""What makes the rollouts of algorithms that have these fields short."""


def small(kind):
    return kind(**{name: value for name, value in SMALL.items() if name in kind.model_fields})


class TestEveryAlgorithm(AlgorithmLaws):
    @pytest.fixture(autouse=True, params=sorted(discover(Algorithm, "posttrain.algorithms")))
    def each(self, request):
        self.algorithm = small(Algorithm.variants[request.param])


@pytest.mark.parametrize("settings", [{"lambda_aux": 0.0}, {"trajectory_length": 0}])
def test_soar_without_auxiliary_points_is_sft_to_the_bit(settings):
    assert torch.equal(gradient(SOAR(**settings), 2), gradient(SFT(), 2))
    soar, sft = collected(SOAR(**settings), toy_policy()), collected(SFT(), toy_policy())
    assert all(torch.equal(soar.fields[k], sft.fields[k]) for k in sft.fields)


def test_reflexflow_without_its_corrections_is_sft_to_the_bit():
    off = ReflexFlow(adr_weight=0.0, fc_alpha=0.0)
    assert torch.equal(gradient(off, 2), gradient(SFT(), 2))


def test_soar_and_reflexflow_share_their_base_items_with_sft():
    soar, reflexflow, sft = (collected(a(), toy_policy()) for a in (SOAR, ReflexFlow, SFT))
    assert torch.equal(soar.latents[:6], sft.latents)
    assert torch.equal(reflexflow.latents, sft.latents)


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
    dropped = collected(SOAR(cond_dropout=0.5, trajectory_length=1), toy_policy(), prompts=40)
    kept = collected(SOAR(cond_dropout=0.0, trajectory_length=1), toy_policy(), prompts=40)
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
        losses.append(update(soar, policy, items, strategy, settings)["loss"].item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
