"""AWM's rollout, noise levels, loss and old policy on a linear velocity, worked out in float64."""

from itertools import pairwise

import pytest
import torch
from by_hand import SHAPE, Given, conditions, linear_policy, loss_of, near, per_item, velocity
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from toys import online_batch, toy_judge, toy_policy

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms._online import clipped_loss
from posttrain.algorithms.awm import AWM, matching_log_prob, mean_square
from posttrain.algorithms.diffusion_nft import implicit_losses, optimality
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import TrainingError
from posttrain.flow import interpolate
from posttrain.flow.strata import stratified, stratified_steps
from posttrain.support.randomness import Draws

GRID = [1.0, 0.8, 0.5, 0.0]
N = 3
GROUP = torch.tensor([7, 7, 8])


def awm(**settings):
    return AWM(**{"num_steps": 3, "solver": "euler", "train_timesteps": 2, **settings})


def batch():
    return Batch(
        torch.empty(N, *SHAPE, device="meta"), torch.tensor([1, 2, 3]), conditions(), group=GROUP.clone()
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("off_policy", "w"), [(False, 0.9), (True, 0.5)])
def test_samples_are_drawn_and_noised_again(guidance, off_policy, w):
    algorithm = awm(guidance_scale=guidance, off_policy=off_policy, train_timesteps=2, timestep_fraction=1.0)
    policy, draws = linear_policy(0.9, old=0.5, reference=-9.0), Draws((0,), range(30, 30 + N))
    with torch.no_grad():
        found, fields = algorithm.rollout(batch(), Tools(policy, draws, lambda steps: GRID[: steps + 1]))
    x = draws.normal("initial", SHAPE).double()
    for s, t in pairwise(GRID):
        x = x + (t - s) * velocity(w, x, torch.full((N,), s), batch().prompt_index, guidance)
    near(found, x)
    assert sorted(fields) == ["latents", "prompt_index", "sigma", "target"]
    noise = draws.normal("noise", (2, *SHAPE)).double()
    near(fields["sigma"], torch.tensor([0.8, 0.5]).expand(N, 2))  # each of the two steps is a part of its own
    for k, sigma in enumerate((0.8, 0.5)):
        near(fields["latents"][:, k], (1 - sigma) * x + sigma * noise[:, k])
        near(fields["target"][:, k], noise[:, k] - x)
        assert fields["prompt_index"][:, k].tolist() == [1, 2, 3]
    assert policy.forward_equivalents == N * (1 if guidance == 1 else 2) * 3


def test_the_rollouts_solver_is_the_one_named():
    found = []
    for solver in ("euler", "dpm2"):
        grid, draws = [1.0, 0.8, 0.4, 0.2], Draws((0,), range(N))
        tools = Tools(linear_policy(0.5), draws, lambda _, grid=grid: grid)
        with torch.no_grad():
            found.append(awm(solver=solver).rollout(batch(), tools)[0])
    assert (found[0] - found[1]).abs().max() > 1e-3


def levels(time_type, *u, steps=14, group=GROUP, draws=None):
    """The sigmas of a grid that is written as the steps' numbers: 0 for the first."""
    algorithm = AWM(num_steps=steps, train_timesteps=len(u), time_type=time_type)
    draws = draws or Given((0,), range(len(group)), values={"times": torch.tensor([u] * len(group))})
    made = Batch(
        torch.empty(len(group), *SHAPE, device="meta"), torch.arange(len(group)), conditions(), group=group
    )
    return algorithm.noise_levels(made, Tools(linear_policy(), draws), [float(i) for i in range(steps + 1)])


LAST = 1 - 2.0**-24
"""The greatest number below 1 in float32."""


@pytest.mark.parametrize(
    ("time_type", "u", "expected"),
    [
        # of 14 steps 0.9 are 12; parts of [1, 12) begin at 1, 2, 4, 6, 8, 10, as in the published code
        ("discrete_wo_init", [0.0] * 6, [1, 2, 4, 6, 8, 10]),
        ("discrete_wo_init", [LAST] * 6, [1, 3, 5, 7, 9, 11]),
        ("discrete", [0.0] * 6, [0, 2, 4, 6, 8, 10]),
        ("discrete", [LAST] * 6, [1, 3, 5, 7, 9, 11]),
        ("discrete", [0.4], [4]),
        ("discrete_with_init", [0.7, *[0.0] * 5], [0, 1, 3, 5, 7, 9]),
        ("discrete_with_init", [0.7, *[LAST] * 5], [0, 2, 4, 6, 8, 11]),
        ("discrete_with_init", [0.7], [0]),
        # the normal's distribution function is 0.158655 at -1 and 0.841345 at 1; then a sigmoid, and shift 3
        ("logit_normal", [0.5], [0.75]),
        ("logit_normal", [0.317310508, 0.682689492], [0.524633, 0.890768]),
        ("logit_normal", [0.0, LAST], [0.01, 1.0]),
        ("uniform", [0.5, 0.5], [2 / 3, 12 / 13]),  # times 0.4 and 0.8
        ("uniform", [0.0], [3 / 7]),
    ],
)
def test_noise_levels(time_type, u, expected):
    found = levels(time_type, *u)
    assert found.dtype == torch.float32
    near(found, torch.tensor(expected, dtype=torch.float64).expand(N, -1))


def test_fewer_steps_than_levels_repeat_some():
    assert levels("discrete_wo_init", *[0.9] * 4, steps=4)[0].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("time_type", ["discrete_wo_init", "logit_normal", "uniform"])
def test_samples_of_a_prompt_share_their_levels_but_for_uniform(time_type):
    group = torch.tensor([5, 5, 6, 6])
    found = levels(time_type, *[0.0] * 4, steps=100, group=group, draws=Draws((0,), range(4)))
    assert torch.equal(found[0], found[1]) == torch.equal(found[2], found[3]) == (time_type != "uniform")
    assert not torch.equal(found[0], found[2])
    alone = levels(time_type, *[0.0] * 4, steps=100, group=group[2:], draws=Draws((0,), range(2, 4)))
    # whatever else is in the micro-batch; the last values of a tensor may be rounded by another instruction
    torch.testing.assert_close(found[2:], alone, rtol=1e-6, atol=0)


parts = st.integers(1, 9).flatmap(lambda k: st.lists(st.floats(0, LAST, width=32), min_size=k, max_size=k))


@given(parts)
def test_there_is_one_point_in_each_part(u):
    point = stratified(torch.tensor([u]))[0] * len(u)
    assert all(i <= p <= i + 1 + 1e-5 for i, p in enumerate(point.tolist()))


@given(parts, st.integers(0, 1), st.integers(1, 999))
def test_steps_rise_and_stay_in_their_range(u, first, count):
    (steps,) = stratified_steps(torch.tensor([u]), first, first + count).tolist()
    assert steps == sorted(steps)
    assert first <= steps[0]
    assert steps[-1] < first + count
    assert len(set(steps)) == len(steps) or count < len(u), "parts do not overlap"


def items(**more):
    x = torch.tensor([[1.0, 0.2], [-0.5, 0.4], [0.3, -2.0]]).view(N, *SHAPE)
    target = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-0.3, 0.8]]).view(N, *SHAPE)
    fields = {
        "latents": x, "target": target, "sigma": torch.tensor([0.9, 0.5, 1.0]), "advantage": torch.tensor([3.0, -1.0, 0.5]),
        "prompt_index": torch.tensor([1, 2, 3]), "sample_index": torch.arange(N),
    }  # fmt: skip
    return Items(torch.ones(N), fields | more, conditions())


def square(w, against=None):
    """The mean squared distance of the velocity of ``w`` from the target, or from that of another weight."""
    i = items()
    v = velocity(w, i.latents, i.sigma, i.prompt_index)
    other = i.target if against is None else velocity(against, i.latents, i.sigma, i.prompt_index)
    return per_item((v - other) ** 2)


SIGMA = torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64)
LOG_PROBS = {
    "uniform": lambda e: -e,
    "t": lambda e: -e * SIGMA,
    "t_squared": lambda e: -e * SIGMA * SIGMA,
    "huber": lambda e: -(e**0.5 - 1e-5) * SIGMA,
    "ghuber": lambda e: -4 * (e**0.25 - 10**-2.5) * SIGMA,
}
ADVANTAGE = torch.tensor([1.2, -0.4, 0.2], dtype=torch.float64)
"""(3, -1, 0.5), of a clip of 5, scaled to 2."""


@pytest.mark.parametrize("weighting", LOG_PROBS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_policy_loss(weighting, off_policy):
    algorithm = awm(weighting=weighting, off_policy=off_policy, beta=0.0, ema_beta=0.0, advantage_max=2.0)
    policy = linear_policy(0.6, **({"old": 0.4} if off_policy else {}))
    at_first = algorithm.with_frozen_velocities(items(), policy)
    with torch.no_grad():
        policy.model.transformer.w += 0.1
    losses = algorithm.loss(at_first, policy)
    before, after = (LOG_PROBS[weighting](square(w)) for w in (0.4 if off_policy else 0.6, 0.7))
    near(at_first.old_log_prob, before)
    ratio = (after - before).exp()
    near(losses.per_item, -ADVANTAGE * ratio)
    found = {"policy_loss", "log_prob", "ratio", "ratio_deviation", "clip_fraction"}
    assert set(losses.metrics) == found
    near(losses.metrics["policy_loss"], -ADVANTAGE * ratio)
    near(losses.metrics["log_prob"], after)
    near(losses.metrics["ratio"], ratio)
    assert all(value.dtype == torch.float32 for value in losses.metrics.values())
    assert policy.forward_equivalents == N * (3 + 1)


def test_small_errors_have_finite_slopes_and_log_probability_0():
    for weighting, power in (("huber", 0.5), ("ghuber", 0.25), ("ghuber", 1.0)):
        error = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        log_prob = matching_log_prob(error, SIGMA, weighting, power)
        near(log_prob, [0.0, 0.0, 0.0])
        log_prob.sum().backward()
        slope = 1e-10 ** (power - 1) * (0.5 if weighting == "huber" else 1)
        near(error.grad, -slope * SIGMA)


def test_at_the_old_policy_its_gradient_is_diffusion_nfts():
    """But for the divisor of an error: AWM has its root mean square, DiffusionNFT its mean absolute value."""
    draw = torch.Generator().manual_seed(0)
    x0, noise, v_old = (torch.randn(N, *SHAPE, generator=draw, dtype=torch.float64) for _ in range(3))
    advantage = torch.tensor([1.5, -0.7, -9.0], dtype=torch.float64)
    of_awm, of_nft = v_old.clone().requires_grad_(), v_old.clone().requires_grad_()
    log_prob = matching_log_prob(mean_square(of_awm - (noise - x0)), SIGMA, "huber", 1.0)
    clipped_loss((log_prob - log_prob.detach()).exp(), advantage.clamp(-5, 5) / 5, 1.0).sum().backward()
    r = optimality(advantage, "all", 5.0)
    positive, negative = implicit_losses(of_nft, v_old, interpolate(x0, noise, SIGMA), x0, SIGMA, beta=1.0)
    (r * positive + (1 - r) * negative).sum().backward()
    error = v_old - (noise - x0)
    divisors = mean_square(error).sqrt() / error.abs().flatten(1).mean(1)
    assert of_awm.grad.abs().flatten(1).amax(1).min() > 0.01, "each sample counts"
    near(of_nft.grad, 2 * divisors[:, None, None, None] * of_awm.grad)


def test_the_ratio_is_clipped_either_way():
    ratio = torch.tensor([1.3, 1.3, 0.6], dtype=torch.float64)
    old = matching_log_prob(square(0.6), SIGMA, "uniform", 1.0) - ratio.log()
    algorithm = awm(weighting="uniform", clip_range=0.2, beta=0.0, ema_beta=0.0)
    losses = algorithm.loss(items(old_log_prob=old), linear_policy(0.6))
    near(losses.per_item, [-0.6 * 1.2, 0.2 * 1.3, -0.1 * 0.6])
    near(losses.metrics["ratio"], ratio)
    near(losses.metrics["ratio_deviation"], [0.3, 0.3, 0.4])
    assert losses.metrics["clip_fraction"].tolist() == [1, 1, 1]
    free = awm(weighting="uniform", clip_range=0.35, beta=0.0, ema_beta=0.0)
    losses = free.loss(items(old_log_prob=old), linear_policy(0.6))
    assert losses.metrics["clip_fraction"].tolist() == [0, 0, 1]
    near(losses.per_item, [-0.6 * 1.3, 0.2 * 1.3, -0.1 * 0.6])


@pytest.mark.parametrize("kl_weighting", ["uniform", "elbo"])
@pytest.mark.parametrize(("beta", "ema_beta"), [(0.3, 0.7), (0.3, 0.0), (0.0, 0.7)])
def test_the_distances(kl_weighting, beta, ema_beta):
    algorithm = awm(beta=beta, ema_beta=ema_beta, kl_weighting=kl_weighting)
    policy = linear_policy(0.6, old=0.4, reference=-0.2)
    losses = loss_of(algorithm, items(), policy)
    # std^2 = 0.49 sigma / (1 - sigma) at 0.9 and 0.5; sigma 1 counts as 1 / (1 - 0.99)
    divisor = torch.tensor([2 * 0.49 * 9, 2 * 0.49, 2 * 0.49 * 100], dtype=torch.float64)
    divisor = divisor if kl_weighting == "elbo" else torch.ones(N)
    kl, ema_kl = square(0.6, -0.2) / divisor, square(0.6, 0.4) / divisor
    near(losses.per_item, -ADVANTAGE / 2 + beta * kl + ema_beta * ema_kl)
    assert ("kl" in losses.metrics, "ema_kl" in losses.metrics) == (beta > 0, ema_beta > 0)
    for name, weight, value in (("kl", beta, kl), ("ema_kl", ema_beta, ema_kl)):
        if weight:
            near(losses.metrics[name], value)
            assert losses.metrics[name].dtype == torch.float32
    assert policy.forward_equivalents == N * (3 + 1 + (beta > 0) + (ema_beta > 0))


@pytest.mark.parametrize(("beta", "ema_beta"), [(0.0, 0.0), (0.3, 0.7)])
def test_the_gradient_is_that_of_the_advantage_times_the_log_probability(beta, ema_beta):
    policy, h = linear_policy(0.6, old=0.4, reference=-0.2), 1e-4
    algorithm = awm(weighting="ghuber", ghuber_power=0.5, beta=beta, ema_beta=ema_beta, advantage_max=2.0)
    loss_of(algorithm, items(), policy).per_item.sum().backward()

    def objective(w):
        log_prob = -2 * square(w).sqrt() * SIGMA
        return (-ADVANTAGE * log_prob + beta * square(w, -0.2) + ema_beta * square(w, 0.4)).sum()

    slope = (objective(0.6 + h) - objective(0.6 - h)) / (2 * h)
    near(policy.model.transformer.w.grad, slope, rtol=1e-3)


def test_what_training_does_not_change_is_computed_once(monkeypatch):
    for settings, uses in (
        ({}, ["old", None, "reference"]),
        ({"off_policy": True}, ["old", "reference"]),
        ({"off_policy": True, "ema_beta": 0.0, "beta": 0.0}, ["old"]),
        ({"ema_beta": 0.0, "beta": 0.0}, [None]),
    ):
        policy = linear_policy(0.6, old=0.4, reference=-0.2)
        found, repeats, using, velocity_of = [], [], policy.using, policy.velocity
        monkeypatch.setattr(policy, "using", lambda name, f=found, u=using: f.append(name) or u(name))
        monkeypatch.setattr(
            policy,
            "velocity",
            lambda *a, repeated=False, r=repeats, v=velocity_of: r.append(repeated) or v(*a),
        )
        algorithm = awm(**settings)
        with torch.no_grad():
            some = algorithm.with_frozen_velocities(items(), policy)
        assert found == uses
        assert repeats == [True] * len(uses), "each is compared with the loss's own"
        assert ("old_velocity" in some.fields) == bool(algorithm.ema_beta)
        assert ("reference_velocity" in some.fields) == bool(algorithm.beta)
        assert algorithm.roles == set(uses) - {None}


@pytest.mark.parametrize("settings", [{}, {"off_policy": True}, {"time_type": "uniform", "weighting": "t"}])
def test_before_the_first_update_the_ratio_is_1_and_the_distances_are_0_to_the_bit(settings):
    algorithm = AWM(group_size=4, num_steps=4, train_timesteps=3, **settings)
    policy = toy_policy()
    for role in algorithm.roles:
        policy.add_role(role)
    made, draws = online_batch(policy.model, 2, 4)
    with torch.no_grad(), toy_judge(policy.model) as judge:
        sigmas = lambda steps: policy.model.sigmas(steps, 2, 2)  # noqa: E731
        some = algorithm.collect(made, Tools(policy, draws, sigmas, judge))
    assert len(some) == 8 * 3 == 8 * rehearse(algorithm).items
    for part in some.split(policy.micro_batch):
        metrics = algorithm.loss(part, policy).metrics
        assert metrics["ratio"].tolist() == [1.0] * len(part)
        assert metrics["kl"].tolist() == metrics["ema_kl"].tolist() == [0.0] * len(part)


def test_the_on_policy_check_is_of_the_weights_that_sampled():
    off = Losses(torch.ones(2), {"ratio_deviation": torch.tensor([0.0, 0.11])})
    with pytest.raises(TrainingError, match=r"off by 0\.11; a tenth of the clip_range of 1 is allowed"):
        AWM().check_on_policy(off)
    AWM(clip_range=1.2).check_on_policy(off)
    AWM(off_policy=True).check_on_policy(off)


def test_all_samples_are_trained_on():
    mask = awm().trained_mask(torch.tensor([0.0, -1.0]))
    assert mask.tolist() == [True, True]
    assert mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("settings", "decays"),
    [
        ({}, [(1, 0.001), (200, 0.2), (300, 0.3), (400, 0.3)]),
        ({"kl_ema_decay": 0.9, "kl_ema_decay_type": "constant"}, [(1, 0.9), (5000, 0.9)]),
        ({"off_policy": True, "ema_beta": 0.0}, [(100, 0.1)]),
    ],
)
def test_the_old_policy_follows(settings, decays):
    for step, decay in decays:
        policy = linear_policy(0.6, old=0.4, reference=-1.0)
        awm(**settings).after_batch(policy, step)
        assert policy.roles["old"]["w"].item() == pytest.approx(decay * 0.4 + (1 - decay) * 0.6)
        assert policy.roles["reference"]["w"].item() == -1


def test_without_an_old_policy_nothing_moves():
    policy = linear_policy(0.6, reference=-1.0)
    awm(ema_beta=0.0).after_batch(policy, 100)
    assert policy.roles["reference"]["w"].item() == -1


def test_squares_are_averaged_in_float64():
    found = mean_square(torch.full((2, 1, 2, 2), 1e-30))
    assert found.dtype == torch.float64
    near(found * 1e60, [1.0, 1.0])


def refused(**settings):
    with pytest.raises(ValidationError) as error:
        AWM.model_validate(settings)
    (found,) = error.value.errors()
    return [*found["loc"], *found.get("ctx", {}).get("path", ())], found["msg"]


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"time_type": "uniform", "timestep_fraction": 0.5}, "timestep_fraction", "time_type 'uniform': it has no steps"),
        ({"weighting": "t", "ghuber_power": 0.5}, "ghuber_power", "with the weighting 't'"),
        ({"beta": 0.0, "ema_beta": 0.0, "kl_weighting": "elbo"}, "kl_weighting", "where beta and ema_beta"),
        ({"ema_beta": 0.0, "kl_ema_decay": 0.5}, "kl_ema_decay", "on-policy without an ema_beta"),
        ({"ema_beta": 0.0, "kl_ema_decay_type": "constant"}, "kl_ema_decay_type", "on-policy without an ema_beta"),
        ({"num_steps": 2}, "timestep_fraction", "0.9 of 2 steps leaves none from step 1 on: use at least 1"),
        ({"num_steps": 9, "timestep_fraction": 0.1, "time_type": "discrete"}, "timestep_fraction", "at least 0.111111"),
    ],
)  # fmt: skip
def test_an_option_without_effect_or_steps_is_refused(settings, field, words):
    where, found = refused(**settings)
    assert where == [field]
    assert words in found


def test_options_with_an_effect_are_not_refused():
    AWM(time_type="discrete", num_steps=2)
    AWM(time_type="uniform", num_steps=2)
    AWM(beta=0.0, kl_weighting="elbo")
    AWM(ema_beta=0.0, kl_weighting="elbo")
    AWM(ema_beta=0.0, off_policy=True, kl_ema_decay=0.5, kl_ema_decay_type="constant")
    AWM(weighting="huber", beta=0.0, ema_beta=0.0)
    assert AWM().step_range == (1, 12)
    assert AWM(time_type="discrete").step_range == (0, 12)
    assert AWM(time_type="discrete_with_init", num_steps=10, timestep_fraction=1.0).step_range == (1, 10)
