"""What SFT and SOAR train on and with which loss, worked out by hand on a linear velocity."""

import math
from dataclasses import replace

import pytest
import torch
from by_hand import SHAPE, Given, conditions, linear_policy, near, step, velocity, wide

from posttrain.algorithm import Batch, Items, Tools
from posttrain.algorithms._flow_matching import loss_weight
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR, auxiliary_point
from posttrain.engine.rehearsal import rehearse

N = 4


def batch():
    latents = torch.arange(2.0 * N).view(N, *SHAPE) / 4 - 1
    return Batch(latents, torch.tensor([1, 2, 3, 1]), conditions(), sample_index=torch.tensor([7, 3, 9, 5]))


def draws(**values):
    return Given(("a stage",), range(10, 10 + N), values=values)


def collected(algorithm, **values):
    policy, given = linear_policy(0.5), draws(**values)
    with torch.no_grad():
        return algorithm.collect(batch(), Tools(policy, given)), given, policy


def shifted(t):
    return 3 * t.double() / (1 + 2 * t.double())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.4, 1.7)])
def test_sft_trains_on_noisy_images_at_logit_normal_times(mean, std):
    items, given, policy = collected(SFT(logit_mean=mean, logit_std=std))
    z, noise = given.normal("timestep", ()).double(), given.normal("noise", SHAPE).double()
    sigma, x0 = shifted(1 / (1 + (-(mean + std * z)).exp())), batch().latents.double()
    near(items.sigma, sigma)
    near(items.latents, (1 - wide(sigma)) * x0 + wide(sigma) * noise)
    near(items.target, noise - x0)
    assert items.prompt_index.tolist() == [1, 2, 3, 1]
    assert items.sample_index.tolist() == [7, 3, 9, 5]
    assert items.weight.tolist() == [1.0] * N
    assert sorted(items.fields) == ["latents", "prompt_index", "sample_index", "sigma", "target"]
    assert items.conditions.table["c"].shape == (4, 1)
    assert policy.forward_equivalents == 0


def test_an_image_without_a_weight_weighs_1_beside_those_that_have_one():
    rows = [{"weight": 2.0}, {"prompt": "a"}, {"weight": 0.0}, {}]
    given = replace(batch(), metadata=rows)
    items = SFT().collect(given, Tools(linear_policy(0.5), draws()))
    assert items.weight.tolist() == [2.0, 1.0, 0.0, 1.0]


def test_sigma_is_that_of_the_latents_height_and_width(monkeypatch):
    policy, asked = linear_policy(0.5), []

    def sigma(t, size):
        asked.append(tuple(size))
        return t

    monkeypatch.setattr(policy.model, "sigma", sigma)
    SFT().collect(batch(), Tools(policy, draws()))
    assert asked == [SHAPE[-2:]]


@pytest.mark.parametrize("scale", [1.29, 0.5])
def test_the_mode_density(scale):
    u = torch.tensor([0.0, 0.3, 0.6, 0.95])
    items, _, _ = collected(SFT(weighting_scheme="mode", mode_scale=scale), timestep=u)
    t = [1 - a - scale * (math.cos(math.pi * a / 2) ** 2 - 1 + a) for a in u.tolist()]
    near(items.sigma, shifted(torch.tensor(t)))


@pytest.mark.parametrize("scheme", ["cosmap", "sigma_sqrt", "none"])
def test_the_other_schemes_draw_times_uniformly(scheme):
    items, given, _ = collected(SFT(weighting_scheme=scheme))
    near(items.sigma, shifted(given.uniform("timestep")))


def test_the_weight_of_each_scheme():
    sigma = torch.tensor([0.2, 0.5, 1.0])
    near(loss_weight("sigma_sqrt", sigma), [25.0, 4.0, 1.0])
    near(loss_weight("cosmap", sigma), [2 / (math.pi * f) for f in (0.68, 0.5, 1.0)])
    for scheme in ("none", "mode", "logit_normal"):
        assert loss_weight(scheme, sigma).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dropout", [0.0, 0.4, 1.0])
def test_condition_dropout_is_the_chance_of_the_empty_prompt(dropout):
    u = torch.tensor([0.39, 0.4, 0.0, 0.99])
    items, _, _ = collected(SFT(cond_dropout=dropout), cond_dropout=u)
    assert items.prompt_index.tolist() == {0.0: [1, 2, 3, 1], 0.4: [0, 2, 0, 1], 1.0: [0, 0, 0, 0]}[dropout]


def test_the_loss_is_the_weighted_mean_squared_velocity_error():
    x, target = torch.tensor([[1.0, 2.0], [0.0, -4.0]]), torch.tensor([[2.0, 3.0], [0.0, 0.0]])
    fields = {
        "latents": x.view(2, *SHAPE), "target": target.view(2, *SHAPE), "sigma": torch.tensor([0.5, 0.25]),
        "prompt_index": torch.tensor([1, 0]), "sample_index": torch.arange(2),
    }  # fmt: skip
    policy = linear_policy(0.5)
    losses = SFT(weighting_scheme="sigma_sqrt").loss(Items(torch.ones(2), fields, conditions()), policy)
    # velocities 0.5 x + sigma + c: (2, 2.5) and (0.35, -1.65)
    near(losses.per_item, [4 * (0 + 0.25) / 2, 16 * (0.35**2 + 1.65**2) / 2])
    assert losses.metrics == {}
    losses.per_item.sum().backward()
    assert policy.model.transformer.w.grad.item() == pytest.approx(4 * -0.5 * 2 + 16 * -1.65 * -4, rel=1e-5)


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps", "sde", "simple"])
@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_soar_adds_points_between_where_a_step_lands_and_the_noise(dynamics, dropout):
    """t0 = 1 has no finite SDE noise of its own, 0.98 too much, and 0.02 is nearer to the image than a step
    is long."""
    t0 = torch.tensor([1.0, 0.5, 0.02, 0.98])
    fractions = torch.rand(3, N, 2, generator=torch.Generator().manual_seed(0))
    fractions[:, 2, 0] = 0.001  # below the floor of sigma
    given = {f"fractions.{i}": fractions[i] for i in range(3)} | {"timestep": t0}
    soar = SOAR(
        weighting_scheme="none", cond_dropout=dropout, lambda_aux=0.75, num_rollout_paths=3, trajectory_length=2,
        sde_rollout_type=dynamics, cfg_scale_sampling=2.5, num_sampling_steps=20, sigma_floor=0.05,
        **({} if dynamics == "sde" else {"sde_noise_scale": 0.6}),
    )  # fmt: skip
    items, given, _ = collected(soar, **given)
    assert len(items) == N * rehearse(soar).items == N * 7
    x0, noise, prompt = batch().latents.double(), given.normal("noise", SHAPE).double(), batch().prompt_index
    t1 = torch.tensor([0.95, 0.45, 0.0, 0.93])
    s0, s1 = shifted(t0), shifted(t1)
    x = (1 - wide(s0)) * x0 + wide(s0) * noise
    v = velocity(0.5, x, s0, prompt, 2.5)
    near(items.take(slice(0, N)).latents, x)
    assert items.weight[:N].tolist() == [1.0] * N
    for path in range(3):
        if path == 0:
            start, weight = x + wide(s1 - s0) * v, [0.75] * N
        else:
            mean, std = step(dynamics, x, v, s0, s1, 0.6, shifted(torch.tensor(0.95)))
            start = mean + std * given.normal(f"rollout.{path}", SHAPE).double()
            weight = [0.75, 0.75, 0.0, 0.75]
        for k in range(2):
            part = items.take(slice(N * (1 + 2 * path + k), N * (2 + 2 * path + k)))
            f = fractions[path, :, k].double()
            sigma = (s1 + f * (1 - s1)).clamp(min=0.05)
            alpha = wide((sigma - s1) / (1 - s1))
            near(part.sigma, sigma)
            near(part.latents, start + alpha * (noise - start), atol=1e-4)
            near(part.target, (start + alpha * (noise - start) - x0) / wide(sigma), atol=1e-3)
            assert part.weight.tolist() == weight
            assert part.prompt_index.tolist() == ([0] * N if dropout else prompt.tolist())
            assert part.sample_index.tolist() == [7, 3, 9, 5]


@pytest.mark.parametrize("settings", [{"lambda_aux": 0.0}, {"trajectory_length": 0}])
def test_soar_without_points_takes_no_step(settings):
    items, _, policy = collected(SOAR(**settings))
    assert len(items) == N
    assert policy.forward_equivalents == 0
    assert rehearse(SOAR(**settings)).items == 1
    assert rehearse(SOAR(**settings)).forward_equivalents == 3


def test_soars_cost():
    assert rehearse(SFT()).items == 1
    assert rehearse(SFT()).forward_equivalents == 3
    assert rehearse(SOAR(num_rollout_paths=2, trajectory_length=3)).items == 7
    assert rehearse(SOAR(num_rollout_paths=2, trajectory_length=3)).forward_equivalents == 3 * 7 + 2
    assert rehearse(SOAR(trajectory_length=1, cfg_scale_sampling=1.0)).forward_equivalents == 3 * 2 + 1
    _, _, policy = collected(SOAR(cfg_scale_sampling=1.0, trajectory_length=1))
    assert policy.forward_equivalents == N


def test_an_auxiliary_point_where_the_step_landed_on_the_noise_or_beside_it():
    x0, noise, start = torch.zeros(3, 1), torch.ones(3, 1), torch.full((3, 1), 0.5)
    sigma1, fraction = torch.tensor([1.0, 0.0, 0.4]), torch.tensor([0.5, 0.0, 1.0])
    latents, sigma, target = auxiliary_point(x0, noise, start, sigma1, fraction, 0.1)
    near(sigma, [1.0, 0.1, 1.0])
    near(latents, torch.tensor([[0.5], [0.55], [1.0]]))
    near(target, torch.tensor([[0.5], [5.5], [1.0]]))
    latents, sigma, target = auxiliary_point(x0, noise, start, sigma1, torch.tensor([0.5, 0.01, 1.0]))
    near(sigma, [1.0, 0.01, 1.0])
    near(target, torch.tensor([[0.5], [50.5], [1.0]]))
    # nearer to the noise than float32 tells: the point stays where the step landed
    close = torch.tensor([1 - 1e-10, 0.5, 0.5], dtype=torch.float64)
    latents, _, _ = auxiliary_point(*(a.double() for a in (x0, noise, start)), close, torch.ones(3).double())
    near(latents[0], [0.505])
