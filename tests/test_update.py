"""One optimizer step on weighted items: numbers worked out by hand, on one process and on several."""

import math
from typing import ClassVar

import pytest
import torch
from lines import NOTES, Pull, descending, items_of, line_policy, noted
from ranks import on_ranks

from posttrain.algorithm import Losses
from posttrain.engine.trainer import OnPolicy, update
from posttrain.errors import AlgorithmError, StepRefused, TrainingError
from posttrain.optim.settings import Train
from posttrain.policy.out_of_memory import OutOfMemory

FREE = Train(steps=4, max_grad_norm=1e9)


def step(items, micro_batch=64, settings=FREE, check=None, a=1.0, algorithm=None):
    """The metrics of a step of learning rate 1, and the weight after it."""
    NOTES.clear()
    policy = line_policy(a, micro_batch=micro_batch)
    metrics = update(algorithm or Pull(), policy, items, descending(policy), settings, check)
    return {name: float(value) for name, value in metrics.items()}, policy.trained["a"].item()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 64])
def test_a_step_goes_down_by_the_weighted_mean_however_items_are_split(micro_batch):
    # weighted mean of x: (1 * 2 + 3 * 4 + 4 * 0.5) / 8 = 2; the item of weight 0 is not looked at
    metrics, a = step(items_of([2, 9, 4, 0.5], weight=[1, 0, 3, 4]), micro_batch)
    assert a == pytest.approx(1 - 2)
    assert metrics == pytest.approx({"loss": 2 - 1, "twice": 4, "grad_norm": 2})
    rows = [x for xs, _ in noted("loss") for x in xs]
    assert rows == [2, 4, 0.5]
    assert [len(xs) for xs, _ in noted("loss")] == {1: [1, 1, 1], 2: [2, 1], 3: [3], 64: [3]}[micro_batch]


@pytest.mark.parametrize(
    ("micro_batch", "seen"), [(1, [[2], [4], [0.5]]), (2, [[2, 4], [0.5, 9]]), (4, [[2, 4, 0.5, 9]]), (5, [[2, 4, 0.5, 9, 7]])]
)  # fmt: skip
def test_compiled_blocks_see_micro_batches_of_one_size_while_there_are_items(micro_batch, seen):
    NOTES.clear()
    policy = line_policy(micro_batch=micro_batch)
    policy.compiled = True
    items = items_of([2, 9, 7, 4, 0.5], weight=[1, 0, 0, 3, 4])
    metrics = update(Pull(), policy, items, descending(policy), FREE)
    assert policy.trained["a"].item() == pytest.approx(1 - 2)
    assert metrics["loss"].item() == pytest.approx(2 - 1)
    assert [xs for xs, _ in noted("loss")] == seen


@pytest.mark.parametrize("compiled", [False, True])
def test_however_many_they_are_items_are_trained_in_their_order(compiled):
    NOTES.clear()
    policy = line_policy(micro_batch=16)
    policy.compiled = compiled
    weight = [float(i % 3 == 0) for i in range(40)]  # torch's other sort keeps the order of up to 16
    update(Pull(), policy, items_of(range(40), weight), descending(policy), FREE)
    (seen,) = [xs for xs, _ in noted("loss")]
    assert seen == list(range(0, 40, 3)) + [1, 2] * compiled


class Averaged(Pull):
    """Gives ``returned`` of the losses that it should give."""

    type: str = "averaged-in-test"
    returned: ClassVar = None

    def loss(self, items, policy):
        return type(self).returned(super().loss(items, policy))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda losses: Losses(losses.per_item.mean()), r"returned per_item as \(\), not one .* \(2,\)"),
        (lambda losses: Losses(losses.per_item[:, None]), r"returned per_item as \(2, 1\)"),
        (lambda losses: Losses(losses.per_item, {"twice": 3}), "returned twice as int"),
        (lambda losses: losses.per_item, "loss of 'averaged-in-test' returned Tensor, not Losses"),
        (lambda losses: None, "returned NoneType, not Losses"),
        (
            lambda losses: Losses(losses.per_item.detach()),
            "returned per_item without gradients: compute it from",
        ),
    ],
)
def test_what_is_not_one_loss_for_each_item_is_refused(returned, words, monkeypatch):
    monkeypatch.setattr(Averaged, "returned", staticmethod(returned))
    with pytest.raises(AlgorithmError, match=words):
        step(items_of([2, 4]), algorithm=Averaged())


def test_a_negative_weight_is_refused():
    with pytest.raises(AlgorithmError, match="items of 'pull-in-test': a weight is negative, -3"):
        step(items_of([2, 4], weight=[1, -3]))


@pytest.mark.parametrize("weight", [[1, math.nan], [math.nan, math.nan], [1, math.inf]])
def test_a_weight_that_is_not_finite_refuses_the_step_and_is_named(weight):
    with pytest.raises(StepRefused) as refused:
        step(items_of([2, 4], weight=weight))
    bad = [i for i, value in enumerate(weight) if not math.isfinite(value)]
    assert [row["sample"] for row in refused.value.samples] == bad


def test_the_gradient_is_clipped_to_the_norm_that_is_told_before_it():
    metrics, a = step(items_of([3, 5]), settings=Train(steps=4, max_grad_norm=0.5))
    assert a == pytest.approx(1 - 0.5, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(4)


def test_two_steps_do_not_add_up_their_gradients():
    policy = line_policy()
    strategy = descending(policy)
    for _ in range(2):
        update(Pull(), policy, items_of([2.0]), strategy, FREE)
    assert policy.trained["a"].item() == pytest.approx(1 - 2 - 2)
    assert policy.trained["a"].grad is None


@pytest.mark.parametrize("weight", [[0, 0], [0.0, -0.0]])
def test_without_weight_there_is_no_step(weight):
    metrics, a = step(items_of([1, 2], weight=weight))
    assert metrics == {"skipped_steps": 1}
    assert a == 1
    assert NOTES == []


@pytest.mark.parametrize("x", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_refused_with_the_weights_as_they_were(x):
    policy = line_policy()
    strategy = descending(policy)
    words = (
        r"^the loss \((nan|inf)\) or the gradient's norm \((nan|inf)\) is not finite; the step was not taken$"
    )
    with pytest.raises(StepRefused, match=words) as refused:
        update(Pull(), policy, items_of([1, x, 5], weight=[1, 1, 0]), strategy, FREE)
    assert policy.trained["a"].item() == 1
    assert policy.trained["a"].grad is None
    ((sample,)) = refused.value.samples
    assert sample == {"sample": 1, "loss": pytest.approx(x, nan_ok=True), "x": pytest.approx(x, nan_ok=True)}


class Overflowing(Pull):
    """A loss that overflows, with a gradient of x; or a finite loss with a gradient that is NaN."""

    spoils: str = "loss"

    def loss(self, items, policy):
        made = super().loss(items, policy)
        if self.spoils == "loss":
            return Losses(made.per_item + torch.where(items.x > 2, math.inf, 0.0))
        root = (policy.trained["a"] - 1).sqrt()  # 0, and its derivative is infinite
        return Losses(made.per_item + 0 * root)


@pytest.mark.parametrize(("spoils", "suspects"), [("loss", [1]), ("gradient", [0, 1])])
def test_a_loss_or_a_gradient_alone_that_is_not_finite_refuses_the_step(spoils, suspects):
    policy, check = line_policy(micro_batch=1), OnPolicy(1)
    with pytest.raises(StepRefused) as refused:
        update(Overflowing(spoils=spoils), policy, items_of([2, 3]), descending(policy), FREE, check)
    assert policy.trained["a"].item() == 1
    assert [row["sample"] for row in refused.value.samples] == suspects


def test_losses_that_are_not_finite_are_not_checked_on_policy():
    NOTES.clear()
    policy, check = line_policy(), OnPolicy(1)
    with pytest.raises(StepRefused):
        update(Pull(), policy, items_of([math.nan]), descending(policy), FREE, check)
    assert (noted("check"), check.done) == ([], False)


def test_all_ranks_refuse_alike_and_each_names_its_own_samples():
    def work(world):
        policy = line_policy()
        items = items_of([math.inf, 2] if world.rank else [1, 2])
        with pytest.raises(StepRefused, match="gradient's norm") as refused:
            update(Pull(), policy, items, summing(descending(policy, world=world)), FREE)
        return policy.trained["a"].item(), [row["sample"] for row in refused.value.samples]

    assert on_ranks(2, work) == [(1, []), (1, [0])]


def summing(strategy):
    """``strategy``, whose step adds up the gradients of all ranks first, as DDP does."""
    step, world, weight = strategy.step, strategy.world, strategy.policy.trained["a"]

    def summed(max_norm):
        weight.grad = world.sum(weight.grad)
        return step(max_norm)

    strategy.step = summed
    return strategy


def test_metrics_are_float32_and_cut_off_from_the_graph():
    policy = line_policy()
    metrics = update(Pull(), policy, items_of([3.0]), descending(policy), FREE)
    assert {value.dtype for value in metrics.values()} == {torch.float32}
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("rows", "micro_batch", "seen"),
    [
        (2, 4, [2]),  # as many as were collected at a time come first, and are checked
        (3, 3, [3]),
        (4, 3, []),  # a micro-batch has become smaller: none is as it was collected
        (6, 8, []),  # there are fewer items than were collected
        (5, 8, [5]),
    ],
)
def test_the_check_is_made_on_as_many_rows_as_were_collected(rows, micro_batch, seen):
    check = OnPolicy(rows)
    assert not check.done
    _, a = step(items_of([1, 2, 3, 4, 5]), micro_batch, check=check)
    assert a == pytest.approx(1 - 3)
    assert [len(losses) for losses in noted("check")] == seen
    assert check.done is bool(seen)
    if seen:
        assert noted("check") == [[x - 1.0 for x in range(1, rows + 1)]]
        assert NOTES.index(("check", *noted("check"))) == 1, "after the first micro-batch, before the second"
    sizes = [len(xs) for xs, _ in noted("loss")]
    assert max(sizes) <= micro_batch
    assert (
        sizes == {(2, 4): [2, 3], (3, 3): [3, 2], (4, 3): [3, 2], (6, 8): [5], (5, 8): [5]}[rows, micro_batch]
    )


def test_only_the_first_micro_batch_is_checked():
    step(items_of([1, 2, 3, 4]), 2, check=OnPolicy(2))
    assert noted("check") == [[0, 1]]
    step(items_of([1, 2, 3, 4]), 2)
    assert noted("check") == []


def test_a_check_that_fails_stops_before_the_step():
    class Wrong(Pull):
        def check_on_policy(self, losses):
            raise TrainingError("moved")

    check = OnPolicy(1)
    with pytest.raises(TrainingError, match="moved"):
        step(items_of([1]), check=check, algorithm=Wrong())
    assert not check.done


def test_memory_that_fails_in_the_optimizer_is_no_reason_to_try_again():
    policy = line_policy()
    strategy = descending(policy)

    def failing():
        raise torch.OutOfMemoryError("out of memory")

    strategy.optimizer.step = failing
    with pytest.raises(TrainingError, match="in the optimizer's step") as found:
        update(Pull(), policy, items_of([1.0]), strategy, FREE)
    assert not isinstance(found.value, OutOfMemory)


def test_weights_are_lowered_once_for_all_micro_batches():
    nested = []

    class Looking(Pull):
        def loss(self, items, policy):
            nested.append(torch.autocast_decrement_nesting())
            torch.autocast_increment_nesting()
            return super().loss(items, policy)

    policy = line_policy(micro_batch=1, autocast=torch.bfloat16)
    update(Looking(), policy, items_of([1.0, 2.0]), descending(policy), FREE)
    assert nested == [0, 0], "one block of autocast is open"
    assert torch.autocast_increment_nesting() == 1, "and is closed at the end"
    torch.autocast_decrement_nesting()


class Begins:
    """Notes what a strategy is told of each micro-batch."""

    def __init__(self, strategy):
        self.told, begin = [], strategy.begin_micro_batch

        def noting(*, last):
            self.told.append(last)
            begin(last=last)

        strategy.begin_micro_batch = noting


def test_the_strategy_is_told_of_the_last_micro_batch_alone():
    policy = line_policy(micro_batch=1)
    begins = Begins(strategy := descending(policy))
    update(Pull(), policy, items_of([1, 2, 3]), strategy, FREE)
    assert begins.told == [False, False, True]


def test_ranks_share_one_normaliser_and_tell_the_same(recwarn):
    """Rank 0 has x = 2 and 4 of weight 1, rank 1 has x = 8 of weight 2 and one of 0: in all 22 / 4."""
    NOTES.clear()
    shares = [([2, 4], [1, 1]), ([8, 100], [2, 0])]

    def work(world):
        policy = line_policy(micro_batch=1)
        begins = Begins(strategy := descending(policy, world=world))
        metrics = update(Pull(), policy, items_of(*shares[world.rank]), strategy, FREE)
        return {k: float(v) for k, v in metrics.items()}, policy.trained["a"].item(), begins.told

    (one, a, begun), (two, b, begun_too) = on_ranks(2, work)
    # each takes the step of its own share here; DDP and FSDP add the gradients up
    assert (a, b) == pytest.approx((1 - 6 / 4, 1 - 16 / 4))
    assert one.pop("grad_norm") == pytest.approx(6 / 4)
    assert two.pop("grad_norm") == pytest.approx(16 / 4)
    assert one == two == pytest.approx({"loss": 22 / 4 - 1, "twice": 11})
    assert begun == begun_too == [False, True], "as many micro-batches on every rank"
    blanks = [(xs, weights) for xs, weights in noted("loss") if weights == [0]]
    assert blanks == [([8], [0])], "the rank with fewer repeats its first item with no weight"


def test_a_rank_without_items_that_count_takes_part():
    def work(world):
        policy = line_policy()
        items = items_of([3, 5], weight=[0, 0] if world.rank else [1, 1])
        metrics = update(Pull(), policy, items, descending(policy, world=world), FREE)
        return policy.trained["a"].item(), float(metrics["loss"])

    NOTES.clear()
    assert on_ranks(2, work) == [pytest.approx((1 - 4, 3)), pytest.approx((1, 3))]
    assert sorted(noted("loss")) == [([3], [0]), ([3, 5], [1, 1])], "a forward of no rows may be impossible"


def test_metrics_that_came_later_count_from_there():
    class Some(Pull):
        def loss(self, items, policy):
            made = super().loss(items, policy)
            return Losses(made.per_item, {"big": items.x} if float(items.x[0]) > 2 else {})

    metrics, _ = step(items_of([1, 3]), 1, algorithm=Some())
    assert metrics["big"] == pytest.approx(1.5)
