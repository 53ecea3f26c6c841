"""Flow-GRPO's rollout and loss on a linear velocity, step by step in float64."""

import math

import pytest
import torch
from by_hand import SHAPE, conditions, gaussian, linear_policy, loss_of, near, per_item, step, velocity, wide

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms._online import clipped_loss
from posttrain.algorithms.flow_grpo import FlowGRPO, guarded, mean_distance
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import TrainingError
from posttrain.support.randomness import Draws

GRID = [1.0, 0.8, 0.5, 0.3, 0.1, 0.0]
N = 4
LEVEL = 0.6


def grpo(**settings):
    return FlowGRPO(**{"num_steps": 5, "noise_level": LEVEL, "guidance_scale": 2.0, **settings})


def batch():
    prompt, group = torch.tensor([1, 1, 2, 3]), torch.tensor([5, 5, 6, 7])
    return Batch(torch.empty(N, *SHAPE, device="meta"), prompt, conditions(), group=group)


def grid(steps):
    assert steps == 5
    return GRID


def rollout(algorithm, key=0):
    policy, draws = linear_policy(0.5, reference=9.0), Draws((key,), range(20, 20 + N))
    with torch.no_grad():
        x, fields = algorithm.rollout(batch(), Tools(policy, draws, grid))
    return x, fields, draws, policy


def log_prob(kind, guard, x, mean, std):
    return -per_item((x - mean) ** 2) if kind == "cps" and not guard else gaussian(x, mean, std)


@pytest.mark.parametrize("kind", ["flow_sde", "cps", "dance"])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("fraction", [0.99, 0.5])
def test_the_rollout_is_stochastic_where_it_is_trained(kind, guard, fraction):
    algorithm = grpo(sde_type=kind, grpo_guard=guard, timestep_fraction=fraction)
    trained = {0.99: 4, 0.5: 2}[fraction]
    found, fields, draws, policy = rollout(algorithm)
    assert rehearse(algorithm).items == trained
    x, prompt = draws.normal("initial", SHAPE).double(), batch().prompt_index
    names = ["latents", "log_prob", "next_latents", "prompt_index", "sigma", "sigma_max", "sigma_next"]
    assert sorted(fields) == sorted(names + ["mean"] * guard)
    for i in range(5):
        s, s_next = torch.full((N,), GRID[i]), torch.full((N,), GRID[i + 1])
        v = velocity(0.5, x, s, prompt, 2.0)
        if i >= trained:
            x = x + wide(s_next - s) * v
            continue
        row = {name: values[:, i] for name, values in fields.items()}
        mean, std = step(kind, x, v, s, s_next, LEVEL, 0.8)
        after = mean + std * draws.normal(f"step.{i}", SHAPE).double()
        expected = {"latents": x, "sigma": s, "sigma_next": s_next, "sigma_max": torch.full((N,), 0.8)}
        expected |= {
            "next_latents": after,
            "prompt_index": prompt,
            "log_prob": log_prob(kind, guard, after, mean, std),
        }
        expected |= {"mean": mean} if guard else {}
        for name, value in expected.items():
            near(row[name], value, atol=1e-4)
        x = after
    assert fields["sigma"].shape == (N, trained)
    near(found, x, atol=1e-4)
    assert policy.forward_equivalents == N * 2 * 5


def test_a_window_is_drawn_for_each_iteration_from_the_range():
    algorithm = grpo(sde_window_size=2, sde_window_range=[1, 4])
    starts = set()
    for key in range(12):
        _, fields, draws, _ = rollout(algorithm, key)
        first = draws.integer("sde_window", 1, 2)
        near(fields["sigma"], torch.tensor([GRID[first : first + 2]] * N))
        starts.add(first)
    assert starts == {1, 2}
    assert rehearse(algorithm).items == 2
    one = grpo(sde_window_range=[2, 3], sde_window_size=1)
    assert rehearse(one).items == 1
    near(rollout(one)[1]["sigma"], torch.full((N, 1), 0.5))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_velocities_of_the_trained_steps_alone_are_those_that_the_loss_repeats(guidance):
    algorithm = grpo(sde_window_range=[2, 4], sde_window_size=2, guidance_scale=guidance)
    policy, told = linear_policy(0.5, reference=9.0), []
    velocity_of = policy.velocity

    def telling(*given, repeated=False):
        told.append(repeated)
        return velocity_of(*given, repeated=repeated)

    policy.velocity = telling
    with torch.no_grad():
        _, fields = algorithm.rollout(batch(), Tools(policy, Draws((0,), range(N)), grid))
    assert told == [False, False, True, True, False]
    told.clear()
    flat = {name: value.flatten(0, 1) for name, value in fields.items()}
    flat |= {"sample_index": torch.arange(2 * N), "advantage": torch.ones(2 * N)}
    items = algorithm.with_frozen_velocities(Items(torch.ones(2 * N), flat, conditions()), policy)
    algorithm.loss(items, policy)
    assert told == [True, False], "the reference's is compared with the loss's own, computed with gradients"


def test_samples_of_a_group_may_start_from_the_same_noise():
    _, own, draws, _ = rollout(grpo())
    _, same, _, _ = rollout(grpo(init_same_noise=True))
    near(own["latents"][:, 0], draws.normal("initial", SHAPE))
    near(same["latents"][:, 0], draws.of([5, 5, 6, 7]).normal("initial", SHAPE))
    assert not torch.equal(same["next_latents"][0, 0], same["next_latents"][1, 0])


def test_samples_without_an_advantage_may_be_left_out():
    a = torch.tensor([0.0, -1.0, 1e-7])
    assert grpo().trained_mask(a).tolist() == [False, True, True]
    assert grpo(drop_zero_advantage=False).trained_mask(a).tolist() == [True, True, True]
    assert grpo(drop_zero_advantage=False).trained_mask(a).dtype == torch.bool


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 1.0}, {"beta": 0.0}, {"beta": 0.0, "guidance_scale": 1.0}]
)
def test_the_cost(settings):
    algorithm = grpo(**settings)
    branches = 1 if settings.get("guidance_scale") == 1 else 2
    # 5 steps of the rollout; on each of 4 items a forward and backward, and the reference's forward
    expected = branches * (5 + 4 * (3 + ("beta" not in settings)))
    assert rehearse(algorithm).forward_equivalents == expected


ADVANTAGE = torch.tensor([1.5, -0.5, 2.0, -1.0])


def items_of(algorithm, at=None):
    """The items of some trained steps, collected with weight 0.5."""
    _, fields, _, _ = rollout(algorithm)
    fields |= {"advantage": ADVANTAGE[:, None].expand(-1, fields["sigma"].shape[1])}
    fields = {name: value[:, at or slice(None)].flatten(0, 1) for name, value in fields.items()}
    fields["sample_index"] = torch.arange(len(fields["sigma"]))
    return Items(torch.ones(len(fields["sigma"])), fields, conditions())


def expected_loss(algorithm, items, w, w_reference):
    """Loss, ratio and KL of a policy of weight ``w`` in float64."""
    kind, guard = algorithm.sde_type, algorithm.grpo_guard
    x, after, s, s_next = items.latents.double(), items.next_latents.double(), items.sigma, items.sigma_next
    v, v_ref = (velocity(number, x, s, items.prompt_index, 2.0) for number in (w, w_reference))
    mean, std = step(kind, x, v, s, s_next, LEVEL, items.sigma_max)
    mean_ref, _ = step(kind, x, v_ref, s, s_next, LEVEL, items.sigma_max)
    log_ratio = log_prob(kind, guard, after, mean, std) - items.log_prob.double()
    if guard:  # mean(noise (mean - mean_old)), noise being that of the rollout
        noise = (after - items.mean.double()) / std
        log_ratio = per_item(noise * (mean - items.mean.double()))
    ratio, a, clip = log_ratio.exp(), items.advantage.double(), algorithm.clip_range
    loss = torch.stack([-ratio * a, -ratio.clamp(1 - clip, 1 + clip) * a]).max(0).values
    if guard:
        loss = loss / (s - s_next).double()
    if algorithm.kl_type == "velocity_mse":
        kl = per_item((v - v_ref) ** 2)
    else:
        per_time = algorithm.kl_type == "without_dt" and kind != "cps"
        kl = per_item((mean - mean_ref) ** 2 / (2 * std**2)) * ((s - s_next).double() if per_time else 1)
    return loss, ratio, kl


@pytest.mark.parametrize("kind", ["flow_sde", "cps", "dance"])
@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("kl_type", ["without_dt", "with_dt", "velocity_mse", None])
def test_the_loss(kind, guard, kl_type):
    beta = {"beta": 0.3, "kl_type": kl_type} if kl_type else {"beta": 0.0}
    algorithm = grpo(sde_type=kind, grpo_guard=guard, clip_range=0.02, **beta)
    items = items_of(algorithm)
    policy = linear_policy(0.7, reference=-0.4)
    losses = loss_of(algorithm, items, policy)
    policy_loss, ratio, kl = expected_loss(algorithm, items, 0.7, -0.4)
    clipped = ((ratio - 1).abs() > 0.02).double()
    assert 0 < clipped.mean() < 1
    near(losses.per_item, policy_loss + algorithm.beta * kl, rtol=1e-3, atol=1e-3)
    metrics = {
        "policy_loss": policy_loss, "ratio": ratio, "ratio_deviation": (ratio - 1).abs(), "clip_fraction": clipped,
    } | ({"kl": kl} if kl_type else {})  # fmt: skip
    assert sorted(losses.metrics) == sorted(metrics)
    for name, value in metrics.items():
        near(losses.metrics[name], value, rtol=1e-3, atol=1e-3)
    assert losses.per_item.requires_grad
    assert policy.model.transformer.w.item() == pytest.approx(0.7)
    branches = 3 + (1 if kl_type else 0)
    assert policy.forward_equivalents == len(items) * 2 * branches


def test_the_gradient_follows_the_policy_and_not_its_reference():
    algorithm, gradients = grpo(clip_range=10.0, beta=0.3), []
    items = items_of(algorithm)
    policy = linear_policy(0.55, reference=-0.4)
    loss_of(algorithm, items, policy).per_item.sum().backward()
    for w in (0.55 - 1e-4, 0.55 + 1e-4):
        loss, _, kl = expected_loss(algorithm, items, w, -0.4)
        gradients.append((loss + 0.3 * kl).sum())
    slope = (gradients[1] - gradients[0]) / 2e-4
    assert policy.model.transformer.w.grad.item() == pytest.approx(slope.item(), rel=1e-2)


def test_the_same_policy_has_ratio_1():
    for kind in ("flow_sde", "cps", "dance"):
        algorithm = grpo(sde_type=kind, clip_range=1e-2)
        losses = loss_of(algorithm, items_of(algorithm), linear_policy(0.5, reference=0.5))
        near(losses.metrics["ratio"], torch.ones(16))
        near(losses.metrics["kl"], torch.zeros(16))
        algorithm.check_on_policy(losses)


@pytest.mark.parametrize(
    ("worst", "passes"), [(0.0, True), (0.000999, True), (0.00102, False), (math.nan, False)]
)
def test_a_ratio_off_by_a_tenth_of_the_clip_range_is_refused(worst, passes):
    algorithm = grpo(clip_range=0.01)
    losses = Losses(torch.zeros(2), {"ratio_deviation": torch.tensor([0.0, worst])})
    if passes:
        algorithm.check_on_policy(losses)
        return
    with pytest.raises(TrainingError, match="must be 1, but it is off by"):
        algorithm.check_on_policy(losses)


def test_a_ratio_off_by_exactly_a_tenth_is_allowed():
    algorithm = grpo(clip_range=0.625)
    algorithm.check_on_policy(Losses(torch.zeros(1), {"ratio_deviation": torch.tensor([0.0625])}))


def test_the_clipped_loss():
    ratio, a = torch.tensor([1.3, 0.7, 1.3, 0.7, 1.05]), torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0])
    near(clipped_loss(ratio, a, 0.1), [-2.2, -1.4, 2.6, 1.8, -2.1])


def test_the_distance_of_two_means_and_the_guarded_ratio():
    mean, other = torch.tensor([[[1.0, 2.0]], [[0.0, 4.0]]]), torch.tensor([[[0.0, 2.0]], [[2.0, 0.0]]])
    std = torch.tensor([0.5, 2.0]).view(2, 1, 1)
    near(mean_distance(mean, other, std), [1.0, 1.25])
    near(guarded(torch.tensor([0.25, -1.0]), mean, other, std), [(0.25 + 0.5 / 0.5) * 0.5, (-1 + 10 / 8) * 2])
