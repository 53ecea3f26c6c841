"""The flow's, the solvers' and the advantages' formulas at points where a person can compute them."""

import math
from itertools import pairwise

import pytest
import torch
from by_hand import gaussian, near, step

from posttrain.flow import advantages
from posttrain.flow.advantages import group_advantages, has_spread, mean_group_std, mixed_advantages, weighted
from posttrain.flow.rectified import (
    expand,
    flow_sde_diffusion,
    guided,
    interpolate,
    log_prob,
    predicted_noise,
    predicted_x0,
    shift_sigma,
    stochastic_step,
)
from posttrain.flow.solvers import solve, trajectory

X = torch.tensor([[[1.0, -2.0]], [[0.5, 3.0]], [[-1.5, 0.25]]])
V = torch.tensor([[[0.3, 1.0]], [[-2.0, 0.7]], [[4.0, -0.1]]])
SIGMA, NEXT = torch.tensor([1.0, 0.6, 0.25]), torch.tensor([0.9, 0.45, 0.0])


def test_the_line_between_image_and_noise():
    assert expand(SIGMA, X).shape == (3, 1, 1)
    assert expand(SIGMA, torch.ones(3, 4, 5, 6)).shape == (3, 1, 1, 1)
    s = torch.tensor([0.25, 0.75])
    x, v = torch.tensor([[8.0], [4.0]]), torch.tensor([[2.0], [-4.0]])
    near(interpolate(x, v, s), [[6.5], [-2.0]])
    near(predicted_x0(x, v, s), [[7.5], [7.0]])
    near(predicted_noise(x, v, s), [[9.5], [3.0]])
    near(guided(x, v, 3.0), [[20.0], [20.0]])
    near(shift_sigma(torch.tensor([0.0, 0.25, 0.5, 1.0]), 3.0), [0.0, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps", "sde", "simple", "dance"])
@pytest.mark.parametrize("level", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_stochastic_step_is_that_of_its_paper(dynamics, level, as_tensor):
    below = torch.tensor(0.9) if as_tensor else 0.9
    mean, std = stochastic_step(dynamics, X, V, SIGMA, NEXT, level, below)
    means, stds = step(dynamics, X.double()[:, None], V.double()[:, None], SIGMA, NEXT, level, 0.9)
    near(mean, means[:, 0])
    near(std, stds.view(3, 1, 1))
    assert mean.dtype == std.dtype == torch.float32


def test_a_stochastic_step_in_float64_is_so_throughout():
    x, v, s, s_next = (a.double() for a in (X, V, SIGMA, NEXT))
    mean, std = stochastic_step("flow_sde", x, v, s, s_next, 0.6, 0.9)
    means, stds = step("flow_sde", x[:, None], v[:, None], s, s_next, 0.6, 0.9)
    near(mean, means[:, 0], rtol=1e-12, atol=0)
    near(std, stds.view(3, 1, 1), rtol=1e-12, atol=0)


def test_the_diffusion_of_the_sde():
    """Just below sigma = 1 it is bounded as at 1: a sigma of training is any number, not one of the grid."""
    found = flow_sde_diffusion(torch.tensor([1.0, 0.96, 0.75, 0.5]), torch.tensor(0.75), 0.7)
    near(found, [0.7 * 2, 0.7 * 2 * 0.96**0.5, 0.7 * 3**0.5, 0.7])


def test_log_prob_of_a_gaussian():
    mean, std = X.flip(0), torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    near(log_prob(X, mean, std), gaussian(X.double(), mean.double(), std.double()))


SIGMAS = [1.0, 0.8, 0.55, 0.4, 0.0]


def dpm(velocity, x, second_order):
    """DPM-Solver++ from its paper: lambda, h, r; sigma 1 and 0, where lambda is infinite, in first order."""
    points, before, h_before = [x], None, None
    for i, (s, t) in enumerate(pairwise(SIGMAS)):
        x0 = x - s * velocity(x, s)
        data = x0
        if s < 1 and t > 0:
            h = math.log((1 - t) / t) - math.log((1 - s) / s)
            if second_order and i > 1:
                data = x0 + (x0 - before) / (2 * (h_before / h))
            x = t / s * x - (1 - t) * (math.exp(-h) - 1) * data
            h_before = h
        else:
            x = t / s * x + (1 - t - (1 - s) * t / s) * data
        before = x0
        points.append(x)
    return points


@pytest.mark.parametrize("solver", ["euler", "dpm1", "dpm2"])
def test_a_solver_steps_as_published(solver):
    calls = []

    def velocity(x, sigma):
        calls.append(sigma)
        return torch.sin(3 * x) + 2 * sigma

    noise = torch.linspace(-2, 2, 7, dtype=torch.float64)
    points = list(trajectory(velocity, noise, SIGMAS, solver))
    assert calls == SIGMAS[:-1]
    assert torch.equal(points[0], noise)
    if solver == "euler":
        expected = [noise]
        for s, t in pairwise(SIGMAS):
            expected.append(expected[-1] - (s - t) * velocity(expected[-1], s))
    else:
        expected = dpm(velocity, noise, solver == "dpm2")
    near(torch.stack(points), torch.stack(expected), rtol=1e-12, atol=1e-12)
    assert torch.equal(solve(velocity, noise, SIGMAS, solver), points[-1])


def test_euler_is_the_default_and_differs_in_its_bits_from_dpm1():
    noise, grid = torch.randn(100, generator=torch.Generator().manual_seed(0)), [1.0, 0.7, 0.3, 0.1]

    def velocity(x, sigma):
        return x.sin() + sigma

    x = noise
    for s, t in pairwise(grid):
        x = x + (t - s) * velocity(x, s)
    assert torch.equal(solve(velocity, noise, grid), x)
    assert torch.equal(solve(velocity, noise, grid, "euler"), x)
    assert torch.equal(list(trajectory(velocity, noise, grid))[-1], x)
    assert not torch.equal(solve(velocity, noise, grid, "dpm1"), x)


REWARDS = torch.tensor([1.0, 4.0, 2.0, 2.0, 5.0, 2.0])
GROUP = torch.tensor([30, 10, 30, 10, 10, 20])
"""Groups (1, 2), (4, 2, 5), (2): means 1.5, 11/3, 2."""
CENTRED = [-0.5, 1 / 3, 0.5, -5 / 3, 4 / 3, 0.0]
WITHIN = (1 / 9 + 25 / 9 + 16 / 9) / 3
"""The variance within the group of three."""


def test_advantages_are_deviations_from_the_groups_mean():
    spread = REWARDS.std(correction=0).item()
    found = group_advantages(REWARDS, GROUP, global_std=True)
    assert found.dtype == torch.float64
    near(found, [c / (spread + 1e-4) for c in CENTRED], rtol=1e-7, atol=0)
    stds = [0.5, WITHIN**0.5, 0.5, WITHIN**0.5, WITHIN**0.5, 0.0]
    found = group_advantages(REWARDS, GROUP, global_std=False)
    near(found, [c / (s + 1e-4) for c, s in zip(CENTRED, stds, strict=True)], rtol=1e-7, atol=0)
    assert advantages.EPSILON == 1e-4


def test_a_group_without_spread_gets_nothing_however_its_mean_rounds():
    rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    for global_std in (True, False):
        found = group_advantages(rewards * 0.7, group, global_std=global_std)
        assert found[:3].tolist() == [0, 0, 0]
        assert found[3] < 0 < found[5]
    assert has_spread(rewards, group).tolist() == [False] * 3 + [True] * 3
    assert has_spread(REWARDS, GROUP).tolist() == [True, True, True, True, True, False]
    assert has_spread(REWARDS - 100, GROUP).tolist() == [True, True, True, True, True, False]


def test_the_mean_of_the_groups_deviations():
    near(mean_group_std(REWARDS, GROUP), (0.5 + WITHIN**0.5 + 0) / 3, rtol=1e-9)
    assert mean_group_std(REWARDS, GROUP).dtype == torch.float64


@pytest.mark.parametrize("global_std", [True, False])
def test_several_rewards_are_summed_before_or_after(global_std):
    rewards, weights = {"b": REWARDS.flip(0) * 10, "a": REWARDS}, {"a": 2.0, "b": -0.5}
    total = 2 * REWARDS.double() - 5 * REWARDS.flip(0).double()
    near(weighted(rewards, weights), total)
    assert weighted(rewards, weights).dtype == torch.float64
    args = (rewards, weights, GROUP)
    summed = mixed_advantages(*args, global_std=global_std, mixing="rewards")
    near(summed, group_advantages(total, GROUP, global_std=global_std))
    a, b = (group_advantages(rewards[k], GROUP, global_std=global_std) for k in "ab")
    near(mixed_advantages(*args, global_std=global_std, mixing="advantages"), 2 * a - 0.5 * b)
