"""Every online algorithm keeps the laws of its family; Flow-GRPO and DiffusionNFT those of their papers."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from toys import alone, online_batch, toy_judge, toy_policy

from posttrain.algorithm import Tools
from posttrain.algorithms._online import Online, clipped_loss
from posttrain.algorithms.awm import AWM
from posttrain.algorithms.diffusion_nft import DiffusionNFT, implicit_losses, old_decay, optimality
from posttrain.algorithms.dpo_online import DPOOnline
from posttrain.algorithms.flow_grpo import FlowGRPO, guarded, mean_distance
from posttrain.engine.rehearsal import rehearse
from posttrain.engine.trainer import OnPolicy, train, update
from posttrain.errors import TrainingError
from posttrain.flow import log_prob, stochastic_step
from posttrain.flow.advantages import group_advantages, has_spread, mixed_advantages
from posttrain.optim.settings import Train
from posttrain.testing import AlgorithmLaws

ONLINE = [
    FlowGRPO(group_size=4, num_steps=4),
    FlowGRPO(group_size=4, num_steps=4, sde_type="cps", guidance_scale=1.0),
    FlowGRPO(group_size=4, num_steps=4, sde_type="dance", kl_type="with_dt"),
    FlowGRPO(group_size=4, num_steps=4, grpo_guard=True, beta=0.0),
    FlowGRPO(group_size=4, num_steps=4, grpo_guard=True, beta=0.0, sde_type="cps"),
    FlowGRPO(group_size=4, num_steps=6, sde_window_size=2, kl_type="velocity_mse"),
    DiffusionNFT(group_size=4, num_steps=4),
    DiffusionNFT(group_size=4, num_steps=4, solver="euler", guidance_scale=2.0, kl_weight=0.0),
    AWM(group_size=4, num_steps=4),
    AWM(
        group_size=4,
        num_steps=4,
        guidance_scale=2.0,
        off_policy=True,
        time_type="logit_normal",
        weighting="t",
    ),
    AWM(group_size=4, num_steps=4, beta=0.0, ema_beta=0.0, time_type="uniform", train_timesteps=2),
]


def named(algorithm):
    changed = algorithm.model_dump(exclude_defaults=True, exclude={"group_size", "num_steps"})
    return f"{algorithm.type}-{'-'.join(map(str, changed.values()))}"


each = pytest.mark.parametrize("algorithm", ONLINE, ids=named)


collected = partial(toys.collected, prompts=3)


class TestLaws(AlgorithmLaws):
    @pytest.fixture(autouse=True, params=ONLINE, ids=named)
    def each(self, request):
        self.algorithm = request.param


@each
def test_the_items_of_a_sample_stay_together(algorithm):
    if not isinstance(algorithm, Online):
        return  # its items are not samples
    items = collected(algorithm, toy_policy())
    per_sample = items.advantage.view(12, -1)
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample))
    assert len(per_sample[:, 0].unique()) == 12


@each
def test_metrics_say_what_was_scored(algorithm):
    items = collected(algorithm, toy_policy())
    assert items.metrics["groups_without_spread"] == 0
    torch.testing.assert_close(items.metrics["reward"].float(), items.metrics["reward/toy"])
    assert items.metrics["item_bytes"] == items.nbytes
    assert not isinstance(algorithm, Online) or len(items.metrics["advantages"]) == 12


@pytest.mark.parametrize("algorithm", [a for a in ONLINE if a.type == "flow_grpo"], ids=named)
def test_replaying_the_rollout_gives_the_very_same_log_probabilities(algorithm):
    policy = toy_policy()
    items = collected(algorithm, policy, prompts=1, micro_batch=4)
    steps = int(rehearse(algorithm).items)
    for j in range(steps):  # the very batches that the rollout had
        order = items.take(slice(j, None, steps))
        ratio = algorithm.loss(order, policy).metrics["ratio"]
        assert (ratio - 1).abs().max() < 1e-6


def test_a_step_of_the_rollout_is_replayed_exactly_in_float32():
    policy, grpo = toy_policy(), FlowGRPO(group_size=4, num_steps=4, drop_zero_advantage=False)
    batch, draws = online_batch(policy.model, 1, 4)
    policy.add_role("reference", moves=False)
    with torch.no_grad():
        tools = Tools(policy, draws, lambda n: policy.model.sigmas(n, 2, 2))
        _, fields = grpo.rollout(batch, tools)
    for j in range(3):
        row = {name: value[:, j] for name, value in fields.items()}
        v = policy.guided_velocity(row["latents"], row["sigma"], batch.prompt_index, batch.conditions, 4.5)
        mean, std = grpo._step(row["latents"], v, row["sigma"], row["sigma_next"], row["sigma_max"])
        assert torch.equal(log_prob(row["next_latents"], mean, std), row["log_prob"])
        if j:
            assert torch.equal(row["latents"], fields["next_latents"][:, j - 1])


def test_a_policy_that_moved_before_its_first_step_is_refused():
    policy, grpo = toy_policy(), FlowGRPO(group_size=4, num_steps=4)
    items = collected(grpo, policy)
    for parameter in policy.trained.values():
        parameter.data += 0.05
    strategy = alone(policy)
    settings = Train(steps=1)
    with pytest.raises(TrainingError, match="must be 1, but it is off by"):
        update(grpo, policy, items, strategy, settings, check=OnPolicy(policy.micro_batch))
    update(grpo, policy, items, strategy, settings)  # a later step on the batch may have another policy


def test_members_of_a_group_start_from_noise_of_their_own():
    policy, grpo = toy_policy(), FlowGRPO(group_size=4, num_steps=4)
    items = collected(grpo, policy)
    first = items.latents[items.sigma == 1]
    assert len(first.flatten(1).unique(dim=0)) == 12


@pytest.mark.parametrize("micro_batch", [3, 100])
def test_members_of_a_group_may_start_alike_and_groups_do_not(micro_batch):
    grpo = FlowGRPO(group_size=4, num_steps=4, init_same_noise=True, drop_zero_advantage=False)
    items = collected(grpo, toy_policy(), micro_batch=micro_batch)
    first = items.latents[items.sigma == items.sigma.max()]
    assert len(first) == 12
    assert len(first.flatten(1).unique(dim=0)) == 3
    again = collected(grpo, toy_policy(), step=1)
    assert not torch.equal(again.latents[again.sigma == again.sigma.max()].unique(dim=0), first.unique(dim=0))


def test_a_window_is_one_for_the_batch_and_moves_between_batches():
    grpo = FlowGRPO(group_size=2, num_steps=10, sde_window_size=2, sde_window_range=[0, 6])
    starts = set()
    for step in range(20):
        sigma = collected(grpo, toy_policy(), prompts=2, step=step, micro_batch=1).sigma.view(-1, 2)
        assert torch.equal(sigma, sigma[:1].expand_as(sigma))
        starts.add(round(1 - sigma[0, 0].item(), 3))
    assert starts == {0.0, 0.1, 0.2, 0.3, 0.4}


def test_equal_rewards_train_nothing_and_take_no_step():
    policy, grpo = toy_policy(), FlowGRPO(group_size=4, num_steps=4)
    items = collected(grpo, policy, reward=lambda images: torch.ones(len(images)))
    assert items.weight.sum() == 0
    assert items.metrics["groups_without_spread"] == 1
    before = [p.clone() for p in policy.trained.values()]
    strategy = alone(policy, torch.optim.AdamW, lr=1.0)
    metrics = update(grpo, policy, items, strategy, Train(steps=1), check=OnPolicy(policy.micro_batch))
    assert list(metrics) == ["skipped_steps"]
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trained.values(), strict=True))


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("adv", [-3.0, 0.5, 5.0])
def test_with_the_old_policy_nft_is_advantage_weighted_regression(beta, adv):
    """Where old equals current, the policy gradient is adv_clip_max (2 r - 1) times that of the adaptive
    regression, for any beta."""
    torch.manual_seed(0)
    v, x, x0 = (torch.randn(4, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    sigma = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    r = optimality(torch.full((4,), adv), "all", 5.0)
    positive, negative = implicit_losses(v, v.detach(), x, x0, sigma, beta)
    (5 / beta * (r * positive + (1 - r) * negative)).sum().backward()
    steered, v.grad = v.grad, None
    plain, _ = implicit_losses(v, v.detach(), x, x0, sigma, 1.0)
    (5 * (2 * r - 1) * plain).sum().backward()
    torch.testing.assert_close(steered, v.grad)


def test_optimality_is_a_probability_in_every_mode():
    a = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.0, 7.0])
    expected = {
        "all": [0, 0, 0.4, 0.5, 0.7, 1],
        "positive_only": [0.5, 0.5, 0.5, 0.5, 0.7, 1],
        "negative_only": [0, 0, 0.4, 0.5, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.5, 0.6, 0.6],
        "binary": [0.4, 0.4, 0.4, 0.5, 0.6, 0.6],
    }
    for mode, values in expected.items():
        torch.testing.assert_close(optimality(a, mode, 5.0), torch.tensor(values))


def test_the_published_decay_schedules():
    assert [old_decay(0, s) for s in (1, 500)] == [0, 0]
    assert [old_decay(1, s) for s in (1, 100, 500, 2000)] == [0.001, 0.1, 0.5, 0.5]
    assert [old_decay(2, s) for s in (74, 75, 76, 209)] == [0, 0, 0.0075, 0.999]


def test_the_old_policy_moves_once_a_batch_and_by_optimizer_steps():
    moves = []

    class Watched(type(toy_policy())):
        def move_role(self, name, decay):
            moves.append((name, decay))

    policy = toy_policy()
    policy.__class__ = Watched
    nft = DiffusionNFT(group_size=4, num_steps=4)
    for role in nft.roles:
        policy.add_role(role)

    def batches():
        for step in range(3):
            batch, draws = online_batch(policy.model, 2, 4, step)
            yield batch, Tools(policy, draws, lambda n: policy.model.sigmas(n, 2, 2), judge)

    class Nothing:
        def before_batch(self, step):
            return True

        def after_step(self, step, samples, metrics):
            assert samples == 4

    with toy_judge(policy.model) as judge:
        settings = Train(steps=6, batch_size=8, steps_per_batch=2, checkpoint_every=2, sample_every=None)
        strategy = alone(policy, torch.optim.SGD, lr=1e-3)
        train(nft, policy, strategy, batches(), settings, Nothing())
    assert moves == [("old", 0.002), ("old", 0.004), ("old", 0.006)]


rewards = st.lists(st.floats(-10, 10, width=32), min_size=12, max_size=12).map(torch.tensor)
GROUP = torch.arange(3).repeat_interleave(4)


@given(rewards, st.booleans())
def test_advantages_are_centred_in_each_group_and_keep_its_order(reward, global_std):
    a = group_advantages(reward, GROUP, global_std=global_std)
    assert a.view(3, 4).mean(1).abs().max() < 1e-9
    for g in range(3):
        r, x = reward.view(3, 4)[g], a.view(3, 4)[g]
        assert bool(((r[:, None] > r[None]) <= (x[:, None] >= x[None])).all())
        if r.max() == r.min():
            assert torch.equal(x, torch.zeros(4, dtype=torch.float64))
    assert has_spread(reward, GROUP).view(3, 4).all(1).tolist() == [
        bool(g.max() > g.min()) for g in reward.view(3, 4)
    ]


@given(rewards, st.permutations(list(range(12))))
def test_advantages_go_with_their_samples(reward, order):
    a = group_advantages(reward, GROUP, global_std=True)
    b = group_advantages(reward[order], GROUP[order], global_std=True)
    torch.testing.assert_close(a[order], b)


def test_mixed_advantages_do_not_depend_on_a_rewards_scale():
    torch.manual_seed(0)
    rewards, weights = {"a": torch.randn(12), "b": torch.randn(12)}, {"a": 1.0, "b": 2.0}
    scaled = {"a": rewards["a"] * 1000, "b": rewards["b"]}
    by_advantage, after = (
        mixed_advantages(r, weights, GROUP, global_std=False, mixing="advantages") for r in (rewards, scaled)
    )
    torch.testing.assert_close(by_advantage, after, rtol=1e-2, atol=1e-2)
    summed = mixed_advantages(rewards, weights, GROUP, global_std=False, mixing="rewards")
    plain = group_advantages(rewards["a"].double() + 2 * rewards["b"].double(), GROUP, global_std=False)
    torch.testing.assert_close(summed, plain)
    assert not torch.allclose(summed, by_advantage)


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"), [(1, 1.2, 0), (1, 0.8, -1), (-1, 1.2, 1), (-1, 0.8, 0)]
)
def test_the_clipped_loss_stops_where_the_policy_gained_enough(advantage, ratio, moves):
    r = torch.tensor([ratio], requires_grad=True)
    clipped_loss(r, torch.tensor([float(advantage)]), 0.1).sum().backward()
    assert r.grad.item() == moves


def test_the_guarded_log_ratio_is_the_mean_of_noise_times_the_move():
    torch.manual_seed(0)
    mean_old, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    mean, std = mean_old + 0.01 * torch.randn(3, 2, 4, 4), torch.full((3, 1, 1, 1), 0.3)
    x = mean_old + std * noise
    change = log_prob(x, mean, std) - log_prob(x, mean_old, std)
    expected = (noise * (mean - mean_old)).flatten(1).mean(1)
    torch.testing.assert_close(guarded(change, mean, mean_old, std), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps", "dance"])
def test_the_guarded_ratio_is_centred_whatever_the_dynamics(dynamics):
    grpo = FlowGRPO(
        group_size=4, num_steps=4, grpo_guard=True, beta=0.0, sde_type=dynamics, guidance_scale=1.0
    )
    policy = toy_policy()
    items = collected(grpo, policy)
    for parameter in policy.trained.values():
        parameter.data += 0.01 * torch.randn_like(parameter)
    change = grpo.loss(items, policy).metrics["ratio"].log()
    v = policy.velocity(items.latents, items.sigma, items.condition)
    mean, std = grpo._step(items.latents, v, items.sigma, items.sigma_next, items.sigma_max)
    noise = (items.next_latents - items.mean) / std
    expected = (noise * (mean - items.mean)).flatten(1).mean(1)
    torch.testing.assert_close(change, expected, rtol=2e-2, atol=1e-5)


def test_kl_is_that_of_two_gaussians():
    mean, other, std = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), torch.full((2, 1, 1, 1), 0.7)
    p, q = (torch.distributions.Normal(m, std) for m in (mean, other))
    expected = torch.distributions.kl_divergence(p, q).flatten(1).mean(1)
    torch.testing.assert_close(mean_distance(mean, other, std), expected)


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance"])
def test_the_sde_keeps_a_gaussians_marginals(dynamics):
    """Data N(0, 0.25): x_sigma has variance (1 - sigma)^2 / 4 + sigma^2 and a velocity in closed form."""
    torch.manual_seed(0)
    grid = torch.linspace(1, 0.05, 400)
    x = torch.randn(20000, 1)
    for s, s_next in pairwise(grid):
        variance = (1 - s) ** 2 / 4 + s**2
        v = x * (s - (1 - s) / 4) / variance
        at = (s.expand(len(x)), s_next.expand(len(x)))
        mean, std = stochastic_step(dynamics, x, v, *at, 0.5, grid[1])
        x = mean + std * torch.randn_like(x)
    expected = ((1 - grid[-1]) ** 2 / 4 + grid[-1] ** 2).sqrt()
    assert abs(x.std() / expected - 1) < 0.03


@pytest.mark.parametrize(
    "algorithm",
    [
        FlowGRPO(group_size=8, num_steps=4, beta=0.0, guidance_scale=1.0, clip_range=1e-2),
        DiffusionNFT(group_size=8, num_steps=4, beta=1.0, decay_type=0),
        AWM(group_size=8, num_steps=4, ema_beta=0.0, beta=0.0),
        DPOOnline(group_size=8, num_steps=4, guidance_scale=1.0, points_per_pair=8, beta=20.0),
    ],
    ids=named,
)
def test_it_learns_to_please_a_simple_reward(algorithm):
    policy, rewards = toy_policy(), []
    strategy = alone(policy, torch.optim.Adam, lr=3e-3)
    settings = Train(steps=40)
    for step in range(40):
        items = collected(algorithm, policy, prompts=4, step=step, micro_batch=1000)
        rewards.append(items.metrics["reward"].item())
        update(algorithm, policy, items, strategy, settings, check=OnPolicy(policy.micro_batch))
        algorithm.after_batch(policy, step + 1)
        policy.roles = {k: v for k, v in policy.roles.items() if k == "none"}
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5


def test_items_in_parts_are_all_there_once():
    items = replace(collected(ONLINE[0], toy_policy()), metrics={})
    parts = list(items.parts_by_sample(5))
    assert [len(p) for p in parts] == [9, 9, 6, 6, 6]  # of 12 samples, with 3 items each
    assert all((p.sample_index % 5 == i).all() for i, p in enumerate(parts))
    assert sorted(torch.cat([p.log_prob for p in parts]).tolist()) == sorted(items.log_prob.tolist())
