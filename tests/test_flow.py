"""The flow's formulas are right where the answer is known."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.algorithms.soar import auxiliary_point
from posttrain.flow.rectified import (
    expand,
    guided,
    interpolate,
    log_prob,
    predicted_noise,
    predicted_x0,
    shift_sigma,
    stochastic_step,
)
from posttrain.flow.solvers import solve

MEAN, STD = 0.7, 0.5


def gaussian_velocity(x, sigma):
    """The exact velocity E[noise - x0 | x_sigma = x] where x0 ~ N(MEAN, STD^2)."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    centred = x - (1 - sigma) * MEAN
    return (sigma - (1 - sigma) * STD**2) / variance * centred - MEAN


def marginal_std(sigma):
    return math.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2)


@pytest.mark.parametrize("solver", ["euler", "dpm1", "dpm2"])
def test_a_gaussian_flow_is_sampled_to_its_data(solver):
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = torch.linspace(1, 0, 201).tolist()
    x = solve(gaussian_velocity, noise, sigmas, solver)
    assert abs(x.mean().item() - MEAN) < 0.02
    assert abs(x.std().item() - STD) < 0.02


def errors(solver, counts):
    noise = torch.linspace(-2, 2, 50, dtype=torch.float64)
    exact = MEAN + STD * noise  # the ODE of a Gaussian flow is affine
    grids = [shift_sigma(torch.linspace(1, 0, n + 1).double(), 2.0).tolist() for n in counts]
    return [(solve(gaussian_velocity, noise, grid, solver) - exact).abs().max().item() for grid in grids]


def test_euler_is_of_first_order():
    coarse, fine = errors("euler", (40, 80))
    assert 1.8 < coarse / fine < 2.2


def test_dpm2_beats_euler_and_dpm1_equals_it():
    assert errors("dpm2", (40,))[0] < 0.5 * errors("euler", (40,))[0]
    assert errors("dpm1", (40,))[0] == pytest.approx(errors("euler", (40,))[0], rel=1e-6)


def sampled(dynamics, level, velocity, steps=400, until=0.0):
    """20,000 samples, in float64, of a stochastic sampler that has come down to sigma ``until``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for sigma, after in itertools.pairwise(sigmas):
        at, to = sigma.expand(len(x)), after.expand(len(x))
        mean, std = stochastic_step(dynamics, x, velocity(x, sigma), at, to, level, sigmas[1])
        x = mean + std * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if after <= until + 1e-9:
            break
    return x


@pytest.mark.parametrize("sigma", [0.75, 0.5, 0.25, 0.0])
def test_the_flow_sde_preserves_every_marginal_of_a_gaussian_flow(sigma):
    x = sampled("flow_sde", 0.7, gaussian_velocity, until=sigma)
    assert x.mean().item() == pytest.approx((1 - sigma) * MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(marginal_std(sigma), rel=0.04)


@pytest.mark.parametrize(("dynamics", "level"), [("cps", 0.8), ("sde", 0.0)])
def test_steps_that_noise_a_prediction_again_keep_the_coefficients_but_lose_spread(dynamics, level):
    """Exact where the data are one point; narrower than data of some width, which a mean cannot stand for."""

    def point_velocity(x, sigma):
        return (x - MEAN) / sigma

    x = sampled(dynamics, level, point_velocity, until=0.5)
    assert x.mean().item() == pytest.approx(0.5 * MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, rel=0.02)
    assert sampled(dynamics, level, gaussian_velocity).std().item() < 0.8 * STD


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps", "simple"])
def test_without_noise_every_stochastic_step_is_the_ode_step(dynamics):
    x, v = torch.randn(2, 5, 3, dtype=torch.float64)
    sigma, after = torch.rand(2, 5, dtype=torch.float64).sort(0, descending=True).values
    mean, std = stochastic_step(dynamics, x, v, sigma, after, 0.0, 0.99)
    torch.testing.assert_close(mean, x + expand(after - sigma, x) * v)
    assert std.abs().max() == 0


def test_the_first_sde_step_has_exactly_the_noise_level_as_std():
    x, v = torch.randn(2, 3, 4, 2, 2)
    one, after = torch.ones(3), torch.full((3,), 0.960129)
    _, std = stochastic_step("flow_sde", x, v, one, after, 0.7, 0.960129)
    torch.testing.assert_close(std.flatten(), torch.full((3,), 0.7))


def test_cps_keeps_the_total_noise_at_sigma():
    x0, noise = torch.zeros(1, 100), torch.ones(1, 100)
    sigma, after = torch.tensor([0.8]), torch.tensor([0.6])
    mean, std = stochastic_step("cps", interpolate(x0, noise, sigma), noise - x0, sigma, after, 0.8, 0.99)
    assert (mean[0, 0] ** 2 + std[0, 0] ** 2).sqrt().item() == pytest.approx(0.6, rel=1e-6)


def test_log_prob_is_the_mean_of_torch_distributions():
    x, mean = torch.randn(2, 4, 3, 2, 2)
    std = torch.rand(4, 1, 1, 1) + 0.1
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(log_prob(x, mean, std), expected)


@given(st.floats(0.001, 0.999), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_endpoints_are_recovered_from_any_point_of_the_line(sigma, seed):
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at = torch.full((3,), sigma, dtype=torch.float64)
    x, v = interpolate(x0, noise, at), noise - x0
    torch.testing.assert_close(predicted_x0(x, v, at), x0)
    torch.testing.assert_close(predicted_noise(x, v, at), noise)


@given(st.floats(0, 1), st.floats(0.5, 6))
@settings(max_examples=50, deadline=None)
def test_shift_keeps_the_ends_and_is_undone_by_its_inverse(t, shift):
    sigma = shift_sigma(torch.tensor(t, dtype=torch.float64), shift)
    assert 0 <= sigma <= 1
    assert shift_sigma(sigma, 1 / shift).item() == pytest.approx(t, abs=1e-9)


@given(st.floats(0, 0.95), st.floats(0, 0.999), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_with_a_perfect_velocity_the_correction_target_is_noise_minus_x0(sigma1, fraction, seed):
    x0, noise = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    start = interpolate(x0, noise, sigma1 * one)
    latents, sigma, target = auxiliary_point(x0, noise, start, sigma1 * one, fraction * one, sigma_floor=1e-3)
    torch.testing.assert_close(latents, interpolate(x0, noise, sigma))
    torch.testing.assert_close(target, noise - x0)


def test_off_the_ray_the_target_still_leads_to_the_image():
    x0, noise, start = torch.randn(3, 2, 4)
    latents, sigma, target = auxiliary_point(
        x0, noise, start, torch.tensor([0.2, 0.6]), torch.tensor([0.5, 0.1])
    )
    torch.testing.assert_close(latents - expand(sigma, x0) * target, x0)


def test_guidance_of_1_is_the_conditional_and_of_0_the_unconditional():
    c, u = torch.randn(2, 3)
    torch.testing.assert_close(guided(c, u, 1.0), c)
    torch.testing.assert_close(guided(c, u, 0.0), u)
