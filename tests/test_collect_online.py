"""What online algorithms make of rewards: advantages, weights and metrics, worked out by hand."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from by_hand import SHAPE, conditions, linear_policy, near
from ranks import on_ranks

from posttrain.algorithm import Batch, Items, Losses, Tools
from posttrain.algorithms import _rollouts
from posttrain.algorithms._online import Online
from posttrain.distributed import world as worlds
from posttrain.distributed.world import ALONE, World
from posttrain.errors import NotFinite, RewardError, StepRefused
from posttrain.scoring.judge import Verdict
from posttrain.support.randomness import Draws
from posttrain.support.stopping import Stopped

QUALITY = [1.0, 4.0, 2.0, 2.0, 2.0, 9.0]
PRICE = [0.5, 0.5, 0.0, 0.0, 0.0, -2.0]
"""Rewards of two groups of three, to be mixed as quality - 2 price: (0, 3, 2) and (2, 2, 13)."""
TOTAL = [0.0, 3.0, 2.0, 2.0, 2.0, 13.0]


class Written(Online):
    """Samples are what the batch has; two items each; samples of advantage below -1 are left out."""

    type: str = "written"

    def rollout(self, batch, tools):
        assert list(tools.draws.ids) == batch.sample_index.tolist()
        fields = {
            "value": batch.latents.flatten(1)[:, :2],
            "prompt_index": batch.prompt_index[:, None].expand(-1, 2),
        }
        return batch.latents + 0.5, fields

    def trained_mask(self, advantage):
        return advantage >= -1

    def loss(self, items, policy):
        return Losses(items.value)


@dataclass
class Scored:
    """A judge that knows the scores beforehand."""

    quality: list = field(default_factory=lambda: QUALITY)
    fails_at: int | None = None
    done: bool = True
    weights: dict = field(default_factory=lambda: {"quality": 1.0, "price": -2.0})
    futures: list = field(default_factory=list)
    seen: list = field(default_factory=list)

    def submit(self, latents, batch):
        self.seen.append((latents, batch))
        future = Future()
        self.futures.append(future)
        if self.fails_at == len(self.futures) - 1:
            future.set_exception(ValueError("the reward broke"))
        elif self.done:
            rows = batch.sample_index - 10
            quality, price = torch.tensor(self.quality)[rows], torch.tensor(PRICE)[rows]
            future.set_result(Verdict({"quality": quality, "price": price}, {"quality/sharp": quality * 10}))
        return future


def batch(count=6):
    latents = torch.arange(2.0 * count).view(count, *SHAPE)
    group = torch.arange(count) // 3
    rows = [{"prompt": str(i)} for i in range(count)]
    prompt = torch.tensor([1, 1, 1, 2, 2, 2])[:count]
    return Batch(latents, prompt, conditions(), rows, group, sample_index=torch.arange(10, 10 + count))


def collected(judge=None, micro_batch=4, world=None, count=6, **settings):
    judge = judge or Scored()
    draws = Draws((0,), range(10, 10 + count))
    tools = Tools(
        linear_policy(micro_batch=micro_batch), draws, judge=judge, **({"world": world} if world else {})
    )
    return Written(group_size=3, **settings).collect(batch(count), tools), judge


def advantages(global_std=True):
    total = torch.tensor(TOTAL, dtype=torch.float64)
    means = torch.tensor([5 / 3] * 3 + [17 / 3] * 3)
    if global_std:
        return (total - means) / (total.std(correction=0) + 1e-4)
    stds = torch.stack([total[:3].std(correction=0), total[3:].std(correction=0)]).repeat_interleave(3)
    return (total - means) / (stds + 1e-4)


@pytest.mark.parametrize("micro_batch", [1, 4, 6, 100])
@pytest.mark.parametrize("global_std", [True, False])
def test_rewards_become_advantages_of_items(micro_batch, global_std):
    items, judge = collected(micro_batch=micro_batch, global_std=global_std)
    assert [len(b) for _, b in judge.seen] == {1: [1] * 6, 4: [4, 2], 6: [6], 100: [6]}[micro_batch]
    assert [row["prompt"] for _, b in judge.seen for row in b.metadata] == list("012345")
    assert torch.equal(torch.cat([x for x, _ in judge.seen]), batch().latents + 0.5)
    a = advantages(global_std)
    near(items.advantage, a.repeat_interleave(2))
    assert items.advantage.dtype == items.weight.dtype == torch.float32
    assert items.weight.tolist() == [float(x >= -1) for x in a for _ in range(2)]
    assert items.sample_index.tolist() == [p for p in range(10, 16) for _ in range(2)]
    assert items.prompt_index.tolist() == [1] * 6 + [2] * 6
    assert items.value.tolist() == list(range(12))
    assert items.conditions.table["c"].shape == (4, 1)


def test_the_metrics():
    items, _ = collected()
    metrics = dict(items.metrics)
    near(metrics.pop("advantages"), advantages())
    total = torch.tensor(TOTAL, dtype=torch.float64)
    within = (total[:3].std(correction=0) + total[3:].std(correction=0)) / 2
    expected = {
        "reward": 22 / 6, "reward_std": total.std(correction=0).item(), "reward_group_std": within.item(),
        "groups_without_spread": 0.0, "samples_trained": (advantages() >= -1).double().mean().item(),
        "reward/quality": 20 / 6, "reward/price": -1 / 6, "reward/quality/sharp": 200 / 6,
        "item_bytes": float(items.nbytes),
    }  # fmt: skip
    assert {name: pytest.approx(value.item(), rel=1e-6) for name, value in metrics.items()} == expected
    flat, _ = collected(Scored(quality=[1.0, 1.0, 0.0, 5.0, 6.0, 7.0]))
    assert flat.metrics["groups_without_spread"] == 0.5
    near(flat.advantage[:6], [0.0] * 6)


@pytest.mark.parametrize("most", [0.5, 1.0, 5.0])
def test_advantages_are_clamped(most):
    items, _ = collected(adv_clip_max=most)
    a = advantages()
    near(items.advantage, a.clamp(-most, most).repeat_interleave(2))
    near(items.metrics["advantages"], a)
    assert (a.abs().max() > most) == (most < 5)
    assert items.metrics["samples_trained"] == (a.clamp(-most, most) >= -1).double().mean()


def test_clamping_on_both_sides():
    items, _ = collected(Scored(quality=[9.0, 1.0, 1.0, 0.0, 9.0, 5.0]), adv_clip_max=0.75)
    assert items.advantage.max() == 0.75
    assert items.advantage.min() == -0.75


@dataclass
class Uneven(Scored):
    """A judge that gives one more detail for one micro-batch of one rank."""

    odd: int = 0

    def submit(self, latents, batch):
        future = super().submit(latents, batch)
        if len(self.futures) - 1 == self.odd:
            future.result().details["quality/more"] = future.result().details["quality/sharp"]
        return future


@pytest.mark.parametrize("odd", [0, 1])
def test_details_that_only_some_images_have_are_an_error(odd):
    with pytest.raises(RewardError, match=r"\['quality/more', 'quality/sharp'\] and \['quality/sharp'\]"):
        collected(Uneven(odd=odd))


def test_details_that_only_one_process_has_are_an_error_of_all():
    def work(world):
        with pytest.raises(RewardError, match="a reward must give equal details for all images"):
            collected(Uneven(odd=0 if world.rank == 1 else -1), world=world, count=3)
        return True

    assert on_ranks(2, work) == [True, True]


def test_advantages_may_be_mixed_instead_of_rewards():
    items, _ = collected(reward_mixing="advantages")
    parts = []
    for values, weight in ((QUALITY, 1.0), (PRICE, -2.0)):
        v = torch.tensor(values, dtype=torch.float64)
        means = v.view(2, 3).mean(1).repeat_interleave(3)
        parts.append(weight * (v - means) / (v.std(correction=0) + 1e-4))
    near(items.metrics["advantages"], sum(parts))


@pytest.mark.parametrize("rank", [0, 1])
def test_advantages_are_relative_to_the_groups_of_all_processes(rank):
    """This process has samples 0 to 2; what it hands over, the others have too, plus 100."""

    @dataclass(frozen=True)
    class Two(World):
        def gather(self, rows):
            asked.append(rows.clone())
            other = rows + 100
            return torch.cat([rows, other] if self.rank == 0 else [other, rows])

        def max(self, value):
            return value

        def gather_objects(self, value):
            return [value] * self.size

        def any(self, flag):
            return flag

    asked = []
    items, _ = collected(world=Two(rank, 2), count=3, micro_batch=2)
    assert len(asked) == 4  # quality, price, the detail and the group
    mine, other = [1.0, 4.0, 2.0], [101.0, 104.0, 102.0]
    price = [0.5, 0.5, 0.0, 100.5, 100.5, 100.0]
    quality = torch.tensor(mine + other, dtype=torch.float64)
    total = quality - 2 * torch.tensor(price, dtype=torch.float64)
    means = total.view(2, 3).mean(1).repeat_interleave(3)
    a = (total - means) / (total.std(correction=0) + 1e-4)
    near(items.advantage, a[:3].repeat_interleave(2))
    assert len(items.metrics["advantages"]) == 6
    near(items.metrics["reward/quality"], quality.mean())
    near(items.metrics["reward/quality/sharp"], (torch.tensor(mine) * 10).mean() + 50)


@dataclass
class Infinite(Scored):
    """A judge that finds no score for the second sample of the micro-batch ``bad``."""

    bad: int = 1

    def submit(self, latents, batch):
        future = super().submit(latents, batch)
        if len(self.futures) - 1 != self.bad:
            return future
        self.futures[-1] = Future()
        self.futures[-1].set_exception(NotFinite("it is nan", [1]))
        return self.futures[-1]


def test_a_score_that_is_not_finite_refuses_the_step_after_the_whole_rollout():
    judge = Infinite()
    with pytest.raises(StepRefused, match=r"^a reward \(it is nan\) is not finite; the step") as refused:
        collected(judge, micro_batch=2)
    assert len(judge.seen) == 3, "sharded weights need every process's forwards"
    assert refused.value.samples == [{"sample": 13, "reason": "it is nan"}]


def test_all_processes_refuse_a_score_that_one_of_them_has():
    def work(world):
        judge = Infinite(bad=0 if world.rank else 9)
        with pytest.raises(StepRefused, match="it is nan") as refused:
            collected(judge, world=world)
        return refused.value.samples

    assert on_ranks(2, work) == [[], [{"sample": 11, "reason": "it is nan"}]]


def test_finite_rewards_whose_sum_is_not_finite_refuse_the_step():
    with pytest.raises(StepRefused, match=r"^the weighted sum of the rewards is not finite"):
        collected(Scored(weights={"quality": 1e308, "price": -2.0}))


class Frozen(Written):
    """The velocity of a role at an item is ten times the item's value; notes the values it was asked for."""

    def frozen_velocities(self, items, policy):
        ASKED.append((items.value.tolist(), policy))
        return {"old_velocity": (10 * items.value).double().view(-1, 1, 1, 1).expand(-1, *SHAPE)}


ASKED = []
"""What :class:`Frozen` was asked, in order; to be cleared by each test."""


class Most:
    """Processes of which one trains at least ``items`` items."""

    def __init__(self, items):
        self.items, self.told = items, []

    def max(self, value):
        self.told.append(value)
        return max(value, self.items)


def valued(*weight):
    """Items of the values 1, 2, ... and these weights."""
    fields = {"value": torch.arange(1.0, len(weight) + 1)}
    fields |= {name: torch.arange(len(weight)) for name in ("prompt_index", "sample_index")}
    return Items(torch.tensor(weight), fields, conditions())


def test_frozen_velocities_are_computed_at_the_items_that_are_trained_and_are_0_elsewhere():
    ASKED.clear()
    items, policy = valued(0.0, 0.5, 0.0, 2.0, 1.0), linear_policy()
    found = Frozen().with_frozen_velocities(items, policy)
    (asked,) = ASKED
    assert asked == ([2, 4, 5], policy)
    assert found.old_velocity.shape == (5, *SHAPE)
    assert found.old_velocity.dtype == torch.float64
    assert found.old_velocity[:, 0, 0].tolist() == [[10 * v] * 2 for v in (0, 2, 0, 4, 5)]
    assert sorted(found.fields) == ["old_velocity", "prompt_index", "sample_index", "value"]
    assert all(found.fields[name] is values for name, values in items.fields.items())
    assert (found.weight is items.weight, found.conditions is items.conditions) == (True, True)
    assert "old_velocity" not in items.fields


@pytest.mark.parametrize(
    ("most", "asked"), [(0, [3, 4]), (2, [3, 4]), (3, [3, 4, 1]), (4, [3, 4, 1, 2]), (9, [3, 4, 1, 2, 5])]
)
def test_a_process_that_trains_fewer_items_than_another_computes_its_first_others_too(most, asked):
    ASKED.clear()
    world = Most(most)
    found = Frozen().with_frozen_velocities(valued(0.0, 0.0, 1.0, 1.0, 0.0), linear_policy(), world)
    assert world.told == [2]
    assert [values for values, _ in ASKED] == [asked]
    assert found.old_velocity[:, 0, 0, 1].tolist() == [10 * v * (v in asked) for v in range(1, 6)]


def test_however_many_they_are_items_are_computed_in_their_order():
    ASKED.clear()
    weight = [float(i % 3 == 0) for i in range(40)]  # torch's other sort keeps the order of up to 16
    Frozen().with_frozen_velocities(valued(*weight), linear_policy())
    assert ASKED[0][0] == list(range(1, 41, 3))


def test_where_no_process_trains_an_item_no_velocity_is_computed():
    ASKED.clear()
    items = valued(0.0, 0.0)
    assert Frozen().with_frozen_velocities(items, linear_policy(), Most(0)) is items
    assert ASKED == []
    found = Frozen().with_frozen_velocities(items, linear_policy(), Most(1))
    assert [values for values, _ in ASKED] == [[1]], "another process does"
    assert found.old_velocity[:, 0, 0, 0].tolist() == [10, 0]


def test_an_algorithm_without_frozen_velocities_has_the_fields_of_its_rollout_alone():
    assert Written().frozen_velocities(valued(1.0), linear_policy()) == {}
    items, _ = collected()
    assert sorted(items.fields) == ["advantage", "prompt_index", "sample_index", "value"]


def test_what_is_collected_has_the_frozen_velocities_and_its_bytes_count_them():
    ASKED.clear()

    @dataclass(frozen=True)
    class One(World):
        def max(self, value):
            return value + 1

    policy, judge = linear_policy(), Scored()
    tools = Tools(policy, Draws((0,), range(10, 16)), judge=judge, world=One())
    items = Frozen(group_size=3, global_std=False).collect(batch(), tools)
    assert items.weight.tolist() == [0, 0, *[1] * 10]
    (asked,) = ASKED
    assert asked == ([*range(2, 12), 0], policy), "another process trains one item more"
    assert items.old_velocity[:, 0, 0, 0].tolist() == [0, 0, *range(20, 120, 10)]
    # an item has two numbers of float64 beside its weight, value and advantage of float32 and two of int64
    assert items.metrics["item_bytes"].item() == 12 * (2 * 8 + 3 * 4 + 2 * 8)


def test_a_reward_that_fails_stops_the_rollout():
    judge = Scored(fails_at=0)
    with pytest.raises(ValueError, match="the reward broke"):
        collected(judge, micro_batch=2)
    assert len(judge.seen) == 1


def test_a_rollout_that_fails_drops_what_is_not_scored_yet():
    class Broken(Written):
        def rollout(self, batch, tools):
            if 14 in batch.sample_index:
                raise ValueError("the rollout broke")
            return super().rollout(batch, tools)

    judge = Scored(done=False)
    tools = Tools(linear_policy(micro_batch=2), Draws((0,), range(10, 16)), judge=judge)
    with pytest.raises(ValueError, match="the rollout broke"):
        Broken(group_size=3).collect(batch(), tools)
    assert [future.cancelled() for future in judge.futures] == [True, True]


def test_a_signal_ends_the_wait_for_scores_where_no_other_process_waits(monkeypatch):
    monkeypatch.setattr(_rollouts, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(worlds.stopping, "requested", lambda: True)
    future: Future[Any] = Future()
    with pytest.raises(Stopped):
        _rollouts._awaited(future, ALONE)
    threading.Timer(0.05, future.set_result, ["scores"]).start()
    assert _rollouts._awaited(future, World(0, 2)) == "scores"


@pytest.mark.parametrize(("told_at", "scored"), [(1, 0), (2, 1), (4, 3)])
def test_a_rollout_is_given_up_between_micro_batches_and_before_it_is_trained(told_at, scored):
    """Three micro-batches: a look before each, and one when all scores are there."""
    looks = []

    @dataclass(frozen=True)
    class Told(World):
        def any(self, flag):
            looks.append(flag)
            return len(looks) == told_at

    judge = Scored()
    with pytest.raises(Stopped):
        collected(judge, world=Told(), micro_batch=2)
    assert len(judge.seen) == scored
