"""The formulas of SFT and SOAR reproduce the published implementations' recorded numbers."""

import pytest
import torch
from parity_vectors import assert_close, ids, of_kind

from posttrain.algorithms._flow_matching import loss_weight
from posttrain.algorithms.soar import auxiliary_point
from posttrain.flow import expand, guided, interpolate, shift_sigma, stochastic_step
from posttrain.flow.solvers import trajectory

SOLVERS = {"flow": "euler", "dpm1": "dpm1", "dpm2": "dpm2"}


@pytest.mark.parametrize("v", of_kind("solver"), ids=ids)
def test_parity_solver(v):
    a, sigmas = v.number("a"), v["sigmas"].tolist()

    def velocity(z, sigma):
        return torch.sin(a * z) * (1 + sigma)

    for i, latents in enumerate(trajectory(velocity, v["initial"], sigmas, SOLVERS[v.meta["solver"]])):
        assert_close(latents, v[f"latents.{i:02d}"], 1e-5)
    assert i == len(sigmas) - 1
    assert_close(latents, v["final"], 1e-5)


def soar_starts(v):
    """Where each rollout path lands, (latents, sample indices), from the recorded draws."""
    x, v_cfg, sigma0, sigma1 = v["z_sigma_t0"], v["v_cfg"], v["sigma_t0"], v["sigma_t1"]
    every = torch.arange(len(x))
    yield x + expand(sigma1 - sigma0, x) * v_cfg, every
    t1 = (v["t0"] - 1 / v.number("num_sampling_steps")).clamp(min=0)
    active = every[t1 > 0]
    for path in range(1, int(v.meta["paths"])):
        mean, std = stochastic_step(
            v.meta["sde"],
            x[active],
            v_cfg[active],
            sigma0[active],
            sigma1[active],
            v.number("noise_scale"),
            v.number("sigma_max"),
        )
        yield mean + std * v[f"draw.noise.{path - 1}"], active


@pytest.mark.parametrize("v", of_kind("soar_points"), ids=ids)
def test_parity_soar_points(v):
    assert_close(interpolate(v["z0"], v["z1"], v["sigma_t0"]), v["z_sigma_t0"], 1e-5)
    recorded = iter(v.points())
    for path, (start, rows) in enumerate(soar_starts(v)):
        for fraction in v[f"draw.fractions.{path}"]:
            point = next(recorded)
            latents, sigma, target = auxiliary_point(
                v["z0"][rows], v["z1"][rows], start, v["sigma_t1"][rows], fraction
            )
            assert torch.equal(point["sample_indices"], rows)
            assert_close(latents, point["latents"], 1e-5)
            assert_close(sigma, point["sigmas"], 1e-5)
            assert_close(target, point["v_corr"], 1e-5)
            assert (point["timesteps"] - 1000 * sigma).abs().max() < 3.1
    assert next(recorded, None) is None


@pytest.mark.parametrize("v", of_kind("soar_points"), ids=ids)
def test_parity_soar_sigmas_are_the_closed_form_within_a_cell_of_the_published_table(v):
    t0, shift = v["t0"], v.number("shift")
    t1 = (t0 - 1 / v.number("num_sampling_steps")).clamp(min=0)
    for t, recorded in ((t0, v["sigma_t0"]), (t1, v["sigma_t1"])):
        cell = shift_sigma((t + 1e-3).clamp(max=1), shift) - shift_sigma(t, shift)
        assert bool(((shift_sigma(t, shift) - recorded).abs() <= cell + 1e-6).all())


@pytest.mark.parametrize("v", of_kind("soar_step"), ids=ids)
def test_parity_soar_step(v):
    network, prompts, pooled = v.transformer(), v["prompt_embeds"], v["pooled"]

    def velocity(latents, timesteps, rows, null=False):
        count = len(latents)
        return network(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=v["null_embeds"].expand(count, -1, -1) if null else prompts[rows],
            pooled_projections=v["null_pooled"].expand(count, -1) if null else pooled[rows],
            return_dict=False,
        )[0]

    z0, z1, sigma0 = v["z0"], v["z1"], v["sigma_t0"]
    rows, scheme = torch.arange(len(z0)), v.meta["weighting"]
    x = interpolate(z0, z1, sigma0)
    v_main = velocity(x, v["timestep_t0"], rows)
    assert_close(v_main, v["v_main"], 1e-4)
    with torch.no_grad():
        v_cfg = guided(v_main, velocity(x, v["timestep_t0"], rows, null=True), v.number("cfg"))
    assert_close(v_cfg, v["v_cfg"], 1e-4)
    t1 = (v["t0"] - 1 / v.number("num_sampling_steps")).clamp(min=0)
    # the published table of 1000 shifted sigmas, its sigma at t = 0 included
    table = shift_sigma(torch.linspace(1, 1e-3, 1000), v.number("shift"))
    sigma1 = table[((1 - t1) * 1000).floor().long().clamp(0, 999)]
    main = loss_weight(scheme, sigma0) * (v_main - (z1 - z0)).square().flatten(1).mean(1)
    assert_close(main.mean(), v["loss_main"], 1e-4)
    recorded, aux = iter(v.points()), []
    v.tensors |= {"z_sigma_t0": x, "sigma_t1": sigma1, "v_cfg": v_cfg}
    v.meta.setdefault("sigma_max", str(float(table[1])))
    for path, (start, active) in enumerate(soar_starts(v)):
        for fraction in v[f"draw.fractions.{path}"]:
            point = next(recorded)
            latents, sigma, target = auxiliary_point(z0[active], z1[active], start, sigma1[active], fraction)
            assert_close(sigma, point["sigmas"], 1e-4)
            error = (velocity(latents, point["timesteps"], active) - target).square().flatten(1).mean(1)
            aux.append(loss_weight(scheme, sigma) * error)
    aux = torch.cat(aux)
    assert len(aux) == int(v["aux_count"])
    lam = v.number("lambda_aux")
    assert_close(lam * aux.mean(), v["loss_aux"], 1e-4)  # the published record has lambda in it
    loss = (main.sum() + lam * aux.sum()) / (len(main) + lam * len(aux))
    assert_close(loss, v["loss_total"], 1e-4)
    loss.backward()
    gradients = {n: p.grad for n, p in network.named_parameters()}
    for name, expected in v.under("grad.").items():
        assert_close(gradients[name], expected, 1e-4)
