"""What DPO trains on and with which loss, from given pairs and from rewards, worked out by hand."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from by_hand import SHAPE, Given, conditions, linear_policy, near, per_item, velocity, wide
from ranks import on_ranks

from posttrain.algorithm import Batch, Tools, Verdict
from posttrain.algorithms.dpo import DPO
from posttrain.algorithms.dpo_online import DPOOnline, extremes
from posttrain.distributed.world import ALONE
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import StepRefused
from posttrain.support.randomness import Draws

N = 3
CHOSEN = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-0.3, 0.8]]).view(N, *SHAPE)
REJECTED = torch.tensor([[0.4, 1.0], [-2.0, 0.5], [0.3, 0.9]]).view(N, *SHAPE)
T = torch.tensor([0.2, 0.5, 0.9])
PROMPT = torch.tensor([1, 3, 2])


def shifted(t):
    return 3 * t.double() / (1 + 2 * t.double())


def of_pairs(algorithm, policy, rows=()):
    batch = Batch(
        CHOSEN, PROMPT, conditions(), rows, sample_index=torch.arange(4, 4 + N), fields={"rejected": REJECTED}
    )
    given = Given(
        ("a stage",),
        range(10, 10 + N),
        values={"timestep": T if algorithm.weighting_scheme == "cosmap" else torch.logit(T)},
    )
    with torch.no_grad():
        return algorithm.collect(batch, Tools(policy, given)), given


def error(w, x0, noise, sigma, prompt=PROMPT):
    """The squared error (n,) of the velocity of weight ``w`` at the noised ``x0``."""
    x = (1 - wide(sigma)) * x0.double() + wide(sigma) * noise.double()
    return per_item((velocity(w, x, sigma, prompt) - (noise.double() - x0.double())) ** 2)


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_the_images_of_a_pair_have_one_noise_and_one_sigma(micro_batch):
    policy = linear_policy(0.5, micro_batch, reference=-0.3)
    items, given = of_pairs(DPO(), policy)
    noise, sigma = given.normal("noise", SHAPE), shifted(T)
    near(items.sigma, sigma)
    near(items.latents, (1 - wide(sigma)) * CHOSEN + wide(sigma) * noise)
    near(items.rejected_latents, (1 - wide(sigma)) * REJECTED + wide(sigma) * noise)
    near(items.target, noise - CHOSEN)
    near(items.rejected_target, noise - REJECTED)
    near(items.reference_loss, error(-0.3, CHOSEN, noise, sigma))
    near(items.rejected_reference_loss, error(-0.3, REJECTED, noise, sigma))
    assert items.weight.tolist() == [1.0] * N
    assert items.prompt_index.tolist() == PROMPT.tolist()
    assert items.sample_index.tolist() == [4, 5, 6]
    assert policy.forward_equivalents == 2 * N
    assert policy.largest_forward == 2 * min(micro_batch, N)
    assert rehearse(DPO()).forward_equivalents == 2 + 3 * 2


def test_a_pair_has_the_weight_of_its_row():
    rows = [{"prompt": "a", "weight": 2.5}, {"prompt": "b"}, {"prompt": "c", "weight": 0.5}]
    items, _ = of_pairs(DPO(), linear_policy(0.5, reference=-0.3), rows)
    assert items.weight.tolist() == [2.5, 1.0, 0.5]


@pytest.mark.parametrize("scheme", ["logit_normal", "cosmap"])
@pytest.mark.parametrize("beta", [0.7, 3.0])
def test_the_loss_is_how_much_more_the_policy_gained_on_the_chosen_image(scheme, beta):
    dpo, policy = DPO(beta=beta, weighting_scheme=scheme), linear_policy(0.5, reference=-0.3)
    items, given = of_pairs(dpo, policy)
    noise, sigma = given.normal("noise", SHAPE), items.sigma.double()
    factor = 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2)) if scheme == "cosmap" else 1
    chosen, rejected, chosen_ref, rejected_ref = (
        factor * error(w, x0, noise, items.sigma) for w in (0.5, -0.3) for x0 in (CHOSEN, REJECTED)
    )
    margin = -beta / 2 * ((chosen - chosen_ref) - (rejected - rejected_ref))
    losses = dpo.loss(items, policy)
    near(losses.per_item, (1 + (-margin).exp()).log())
    assert 0 < (margin > 0).sum() < N
    expected = {
        "margin": margin, "accuracy": (margin > 0).double(), "chosen_loss": chosen, "rejected_loss": rejected,
    }  # fmt: skip
    assert sorted(losses.metrics) == sorted(expected)
    for name, value in expected.items():
        near(losses.metrics[name], value)
    assert dpo.roles == {"reference"}
    batch = Batch(CHOSEN, PROMPT, conditions())
    assert torch.equal(dpo.as_given(batch).fields["rejected"], -CHOSEN)


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_a_policy_that_is_the_reference_has_margin_0_to_the_bit(micro_batch):
    policy = linear_policy(0.5, micro_batch, reference=0.5)
    items, _ = of_pairs(DPO(), policy)
    for part in items.split(micro_batch):
        losses = DPO().loss(part, policy)
        assert losses.metrics["margin"].tolist() == [0.0] * len(part)
        assert losses.metrics["accuracy"].tolist() == [0.0] * len(part)
        near(losses.per_item, torch.full((len(part),), 0.6931471805599453))


def test_the_reference_is_computed_as_the_loss_repeats_it(monkeypatch):
    policy, asked = linear_policy(0.5, 2, reference=0.5), []
    real = policy.velocity
    monkeypatch.setattr(policy, "velocity", lambda *a, repeated=False: asked.append(repeated) or real(*a))
    items, _ = of_pairs(DPO(), policy)
    assert asked == [True, True]
    DPO().loss(items, policy)
    assert asked[2:] == [False]


GRID = [1.0, 0.8, 0.5, 0.3, 0.0]
SCORES = [1.0, 4.0, 2.0, 3.0, 3.0, 3.0, 5.0, 6.0, 5.0]
"""Rewards of three groups of three; those of the second are equal."""


@dataclass
class Scored:
    """A judge that knows the scores beforehand, by the samples' positions."""

    scores: list = field(default_factory=lambda: SCORES)
    weights: dict = field(default_factory=lambda: {"score": -1.0})

    def submit(self, latents, batch):
        future = Future()
        scores = torch.tensor(self.scores)[batch.sample_index]
        future.set_result(Verdict({"score": scores}, {}))
        return future


def of_rewards(algorithm, policy, judge, world=ALONE):
    size = 9 // world.size
    places = range(size * world.rank, size * (world.rank + 1))
    group = torch.tensor(places) // 3
    batch = Batch(
        torch.empty(size, *SHAPE, device="meta"), group + 1, conditions(), [{"prompt": str(i)} for i in places],
        group, torch.tensor(places),
    )  # fmt: skip
    draws = Draws(("a stage",), [f"id {i}" for i in places])
    tools = Tools(policy, draws, lambda steps: GRID[: steps + 1], judge, world)
    with torch.no_grad():
        return algorithm.collect(batch, tools)


def online(**settings):
    return DPOOnline(**{"group_size": 3, "num_steps": 3, "points_per_pair": 2, **settings})


def samples(w, guidance):
    draws = Draws(("a stage",), [f"id {i}" for i in range(9)])
    x, prompt = draws.normal("initial", SHAPE).double(), torch.arange(9) // 3 + 1
    for s, t in pairwise(GRID[:4]):
        x = x + (t - s) * velocity(w, x, torch.full((9,), s), prompt, guidance)
    return x


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("micro_batch", [2, 64])
def test_the_best_and_the_worst_sample_of_a_group_are_a_pair_at_several_times(guidance, micro_batch):
    algorithm, policy = online(guidance_scale=guidance), linear_policy(0.5, micro_batch, reference=-0.3)
    items = of_rewards(algorithm, policy, Scored())
    best, worst = [0, 6], [1, 7]  # the weight is negative; of equal samples the first
    x0 = samples(0.5, guidance)
    assert items.weight.tolist() == [1.0] * 4
    assert items.sample_index.tolist() == [*best, *best]
    assert items.prompt_index.tolist() == [1, 3, 1, 3]
    assert items.conditions.table["c"].shape == (4, 1)
    for point in (0, 1):
        draws = Draws(("a stage", "point", point), ["id 0", "id 6"])
        at, noise = slice(2 * point, 2 * point + 2), draws.normal("noise", SHAPE).double()
        sigma = shifted(torch.sigmoid(draws.normal("timestep", ()).double()))
        near(items.sigma[at], sigma)
        near(items.target[at], noise - x0[best])
        near(items.rejected_target[at], noise - x0[worst])
        near(items.rejected_latents[at], (1 - wide(sigma)) * x0[worst] + wide(sigma) * noise)
        near(items.reference_loss[at], error(-0.3, x0[best], noise, sigma, torch.tensor([1, 3])))
    branches = 1 if guidance == 1 else 2
    assert policy.forward_equivalents == 9 * 3 * branches + 4 * 2
    assert rehearse(algorithm).items == 2 / 3
    assert rehearse(algorithm).decoded


def test_the_rollouts_solver_is_the_one_named():
    euler, dpm = (
        of_rewards(online(solver=s, num_steps=4), linear_policy(0.5, reference=0.5), Scored())
        for s in ("euler", "dpm2")
    )
    assert (euler.target - dpm.target).abs().max() > 1e-3


def test_the_metrics_say_how_many_groups_were_dropped():
    items = of_rewards(online(), linear_policy(reference=0.5), Scored())
    found = {name: value.item() for name, value in items.metrics.items()}
    assert found["pairs"] == 2
    assert found["groups_without_spread"] == pytest.approx(1 / 3)
    assert found["reward"] == pytest.approx(-sum(SCORES) / 9)
    assert found["reward/score"] == pytest.approx(sum(SCORES) / 9)
    assert found["item_bytes"] == items.nbytes


def test_equal_rewards_give_one_filler_that_counts_nothing():
    items = of_rewards(online(), linear_policy(reference=0.5), Scored([2.0] * 9))
    assert items.weight.tolist() == [0.0, 0.0]
    assert items.sample_index.tolist() == [-1, -1]
    assert items.metrics["pairs"] == 0


def test_finite_rewards_whose_sum_is_not_finite_refuse_the_step():
    with pytest.raises(StepRefused, match=r"^the weighted sum of the rewards is not finite"):
        of_rewards(online(), linear_policy(reference=0.5), Scored(weights={"score": 1e308}))


def test_a_pair_is_trained_by_the_process_that_has_its_chosen_sample():
    """Each of three processes has a group; the second group has no spread, and the last no chosen sample."""
    scores = [3.0, 1.0, 2.0, 3.0, 3.0, 3.0, 5.0, 6.0, 5.0]
    whole = of_rewards(online(), linear_policy(0.5, 64, reference=-0.3), Scored(scores))
    parts = on_ranks(
        3, lambda world: of_rewards(online(), linear_policy(0.5, 64, reference=-0.3), Scored(scores), world)
    )
    assert [part.weight.tolist() for part in parts] == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    assert [part.sample_index.tolist() for part in parts] == [[1, 1], [-1, -1], [6, 6]]
    for rank, rows in ((0, [0, 2]), (2, [1, 3])):
        for name in ("latents", "rejected_latents", "reference_loss", "sigma", "target"):
            torch.testing.assert_close(parts[rank].fields[name], whole.fields[name][rows])
    assert [part.metrics["pairs"].item() for part in parts] == [2.0] * 3


def test_a_pair_may_lie_in_two_processes():
    """Of two processes the first has samples 0 to 3, the other 4 to 7, in groups of four and of eight."""
    scores = torch.tensor([1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    best, worst = extremes(scores, torch.zeros(8, dtype=torch.int64))
    assert (best.tolist(), worst.tolist()) == ([2], [6])

    def work(world):
        places = range(4 * world.rank, 4 * world.rank + 4)
        batch = Batch(
            torch.empty(4, *SHAPE, device="meta"), torch.ones(4, dtype=torch.int64), conditions(), [{}] * 4,
            torch.zeros(4, dtype=torch.int64), torch.tensor(places),
        )  # fmt: skip
        tools = Tools(
            linear_policy(reference=0.5),
            Draws((1,), places),
            lambda _: GRID,
            Scored(scores.tolist(), {"score": 1.0}),
            world,
        )
        with torch.no_grad():
            return online(group_size=8, points_per_pair=1).collect(batch, tools), tools.draws

    (first, draws), (second, others) = on_ranks(2, work)
    assert (first.weight.tolist(), second.weight.tolist()) == ([1.0], [0.0])
    noise = Draws((1, "point", 0), [2]).normal("noise", SHAPE)
    x0 = torch.cat([draws.normal("initial", SHAPE), others.normal("initial", SHAPE)]).double()
    for s, t in pairwise(GRID):
        x0 = x0 + (t - s) * velocity(0.5, x0, torch.full((8,), s), torch.ones(8, dtype=torch.int64), 4.5)
    near(first.target, noise - x0[2:3])
    near(first.rejected_target, noise - x0[6:7])


@pytest.mark.parametrize(
    ("scores", "group", "best", "worst"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], [1, 3], [0, 2]),
        ([2, 2, 5, 5], [0, 0, 1, 1], [], []),
        ([2, 1, 2, 1], [3, 3, 3, 3], [0], [1]),
        ([1, 9, 0, 3], [1, 0, 1, 0], [1, 0], [3, 2]),
    ],
)
def test_the_extremes_of_each_group(scores, group, best, worst):
    found = extremes(torch.tensor(scores, dtype=torch.float64), torch.tensor(group))
    assert [positions.tolist() for positions in found] == [best, worst]
    assert all(positions.dtype == torch.int64 for positions in found)
