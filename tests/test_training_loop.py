"""The loop around the steps: learning rates, parts of a batch, the EMA, fillers, checks, and where it ends."""

import math
import weakref
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from lines import NOTES, Pull, Steps, descending, line_policy, noted, of
from ranks import on_ranks

from posttrain.engine import trainer
from posttrain.engine.trainer import EMA, REFERENCE, train
from posttrain.errors import AlgorithmError, StepRefused, TrainingError
from posttrain.optim.schedule import learning_rate
from posttrain.optim.settings import Train
from posttrain.policy.out_of_memory import OutOfMemory


def settings(steps, **more):
    return Train(**{"steps": steps, "learning_rate": 1.0, "max_grad_norm": 1e9, "batch_size": 4, **more})


def trained(batches, given, policy=None, watch=None, algorithm=None, strategy=None, **more):
    """The watch, the policy, and how many batches were drawn."""
    NOTES.clear()
    policy, watch, drawn = policy or line_policy(), watch or Steps(), []

    def source():
        for made in batches:
            drawn.append(made)
            yield made(policy)

    strategy = strategy or descending(policy, lr=123.0)
    train(algorithm or Pull(), policy, strategy, source(), given, watch, **more)
    return watch, policy, len(drawn)


def test_each_step_has_its_own_learning_rate_and_its_own_batch():
    # lr of steps 1 to 4: 1/2, 2/2, then half a cosine over the remaining two: 1, 1/2
    given = settings(4, schedule="cosine", warmup_steps=2)
    watch, policy, drawn = trained([of([x]) for x in (1, 2, 3, 4, 5)], given, policy=line_policy(0))
    assert policy.trained["a"].item() == pytest.approx(-(0.5 * 1 + 1 * 2 + 1 * 3 + 0.5 * 4))
    assert watch.asked == [0, 1, 2, 3]
    assert drawn == 4
    assert [(step, samples) for step, samples, _ in watch.told] == [(1, 1), (2, 1), (3, 1), (4, 1)]
    assert [note[0] for note in NOTES] == ["collect", "loss", "check", "after"] + [
        "collect",
        "loss",
        "after",
    ] * 3
    assert [step for step, _ in noted("after")] == [1, 2, 3, 4]
    assert noted("collect") == [0, *[a for _, a in noted("after")][:3]], "on the weights as they are then"


def test_the_metrics_of_a_step_come_before_those_of_its_batch():
    watch, _, _ = trained([of([3])], settings(1))
    assert watch.told == [(1, 1, {"mean_x": 3, "loss": 2, "twice": 6, "grad_norm": 3})]


@pytest.mark.parametrize("start", [1, 2])
def test_a_stage_goes_on_with_the_step_it_had_come_to(start):
    given = settings(3, schedule="linear")  # lr 1, 2/3, 1/3
    watch, policy, drawn = trained([of([1])] * 3, given, policy=line_policy(0), start=start)
    assert policy.trained["a"].item() == pytest.approx(-sum((1, 2 / 3, 1 / 3)[start:]))
    assert [step for step, *_ in watch.told] == list(range(start + 1, 4))
    assert watch.asked == list(range(start, 3))
    assert drawn == 3 - start
    assert noted("check") == [], "its weights have moved since the first batch was checked"


def test_a_finished_stage_asks_for_nothing():
    watch, _, drawn = trained([of([1])], settings(2), start=2)
    assert (watch.asked, watch.told, drawn) == ([], [], 0)


def test_the_watch_ends_a_stage_before_the_next_batch_is_drawn():
    watch, _, drawn = trained([of([1])] * 5, settings(5), watch=Steps(last=2))
    assert watch.asked == [0, 1, 2]
    assert len(watch.told) == drawn == 2


def test_data_that_end_too_soon_are_an_error():
    with pytest.raises(TrainingError, match="the data ended after 2 of 5 steps"):
        trained([of([1])] * 2, settings(5))


def test_what_is_collected_must_be_items(monkeypatch):
    monkeypatch.setattr(Pull, "collect", lambda self, batch, tools: None)
    with pytest.raises(AlgorithmError, match="collect of 'pull-in-test' returned NoneType, not Items"):
        trained([of([1])], settings(1))


def test_the_average_moves_after_every_step_by_its_decay():
    policy = line_policy(0)
    policy.add_role(EMA)
    policy.add_role(REFERENCE, moves=False)
    averages = []

    class Looking(Steps):
        def after_step(self, *_):
            averages.append(policy.roles[EMA]["a"].item())

    trained([of([1]), of([2])], settings(2, ema=0.75), policy=policy, watch=Looking())
    # weights -1 and -3; average 0.75 * 0 - 0.25, then 0.75 * -0.25 - 0.25 * 3
    assert averages == pytest.approx([-0.25, -0.1875 - 0.75])
    assert policy.roles[REFERENCE]["a"].item() == 0


def test_without_a_decay_no_average_moves():
    policy = line_policy(0)
    policy.add_role(EMA)
    trained([of([1])], settings(1), policy=policy)
    assert policy.roles[EMA]["a"].item() == 0


def test_fillers_train_nothing_and_are_no_samples():
    made = of([2, 4, 100, 100], sample_index=[0, 1, -1, -1], total=2)
    watch, policy, _ = trained([made], settings(1), policy=line_policy(0))
    assert policy.trained["a"].item() == pytest.approx(-3)
    assert watch.told[0][1] == 2
    assert noted("loss") == [([2, 4], [1, 1])]


def test_the_weights_of_items_are_kept():
    made = of([2, 4, 6], weight=[3, 1, 0], sample_index=[0, 1, 2])
    _, policy, _ = trained([made], settings(1), policy=line_policy(0))
    assert policy.trained["a"].item() == pytest.approx(-10 / 4)


def test_each_step_on_a_batch_takes_an_equal_part_of_it():
    # places 0 to 4: steps on {0, 2, 4} and {1, 3}
    given = settings(4, steps_per_batch=2, schedule="linear")
    watch, policy, drawn = trained([of([1, 2, 3, 4, 5])] * 2, given, policy=line_policy(0))
    assert [xs for xs, _ in noted("loss")] == [[1, 3, 5], [2, 4]] * 2
    assert policy.trained["a"].item() == pytest.approx(-3 * (1 + 0.75 + 0.5 + 0.25))
    # 5 samples are 2 and 3, so that a batch is counted once
    assert [(step, samples) for step, samples, _ in watch.told] == [(1, 2), (2, 3), (3, 2), (4, 3)]
    assert watch.asked == [0, 2]
    assert drawn == 2
    assert [step for step, _ in noted("after")] == [2, 4], "once a batch, after its last step"
    assert len(noted("collect")) == 2


@pytest.mark.parametrize(
    ("chunk", "checked"),
    [(2, [[1.0, 2.0]]), (3, []), (4, [])],  # of a batch of 4, a part of 2 items is trained
)
def test_only_the_part_that_is_trained_first_is_checked(chunk, checked):
    given = settings(2, steps_per_batch=2)
    policy = line_policy(1, micro_batch=chunk)
    trained([of([2, 7, 3, 8])], given, policy=policy)
    assert noted("check") == checked


def test_the_check_is_made_once_on_what_the_rollout_held_at_a_time():
    policy = line_policy(1, micro_batch=2)
    trained([of([1, 2, 3])] * 3, settings(3), policy=policy)
    assert noted("check") == [[0, 1]]
    trained([of([1, 2, 3])], settings(1), policy=line_policy(1, micro_batch=8))
    assert noted("check") == [[0, 1, 2]], "a batch smaller than the chunk is checked whole"


def test_a_batch_without_weight_leaves_the_check_to_the_next_part_and_batch():
    nothing = of([1, 2], weight=[0, 0])
    half = of([1, 2, 3, 4], weight=[0, 5, 0, 5])
    watch, _, _ = trained([nothing, of([5, 6])], settings(2))
    assert noted("check") == [[4, 5]]
    assert watch.told[0][2] == {"mean_x": 1.5, "twice": 99, "skipped_steps": 1}
    # its first part trains nothing, so the second is still by the weights that collected it
    trained([half], settings(2, steps_per_batch=2), policy=line_policy(1, micro_batch=2))
    assert noted("check") == [[1, 3]]


def test_a_part_whose_check_was_not_made_moves_the_weights_and_the_next_batch_is_checked():
    # parts of 1 and 3 items of a batch of 4; two rows at a time
    made = of([1, 2, 3, 4], sample_index=[0, 1, 3, 5])
    policy = line_policy(1, micro_batch=2)
    trained([made, of([5, 6, 7, 8])], settings(4, steps_per_batch=2), policy=policy)
    assert len(noted("check")) == 1
    assert [len(xs) for xs, _ in noted("loss")][:3] == [1, 2, 1], "not the second part, after a step"
    assert NOTES.index(("check", noted("check")[0])) > NOTES.index(("after", 2, noted("after")[0][1]))


class Full(Pull):
    """Has memory for two rows at a time; ``where`` says in which of its methods it counts."""

    where: str

    def collect(self, batch, tools):
        if self.where == "collect" and tools.policy.micro_batch > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().collect(batch, tools)

    def loss(self, items, policy):
        made = super().loss(items, policy)
        if self.where == "loss" and len(items) > 2:
            made.per_item.sum().backward()  # what failed may have left gradients behind
            raise torch.OutOfMemoryError("out of memory")
        return made


@pytest.mark.parametrize("where", ["collect", "loss"])
def test_what_did_not_fit_is_done_again_in_halves_with_nothing_left_of_it(where):
    policy = line_policy(0, micro_batch=4)
    trained([of([1, 2, 3, 6])], settings(1), policy=policy, algorithm=Full(where=where))
    assert policy.trained["a"].item() == pytest.approx(-3)
    assert policy.micro_batch == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_strategy_that_cannot_repeat_stops_and_forgets_its_gradients(ranks):
    def work(world):
        policy = line_policy(0, micro_batch=4)
        strategy = descending(policy, world=world)
        strategy.repeatable = ranks == 2  # other ranks would wait for what was sent already
        made = of([1, 2, 3, 6])
        with pytest.raises(OutOfMemory) as found:
            trained([made], settings(1), policy=policy, algorithm=Full(where="loss"), strategy=strategy)
        return found.value.micro_batch, policy.trained["a"].grad

    assert on_ranks(ranks, work) == [(2, None)] * ranks


class Rows(Pull):
    """Notes in ``seen``, by rank, the micro-batch of each rollout and the rows of each loss."""

    seen: ClassVar = []

    def collect(self, batch, tools):
        self.seen.append((tools.world.rank, "micro-batch", tools.policy.micro_batch))
        return super().collect(batch, tools)

    def loss(self, items, policy):
        self.seen.append((torch.distributed.get_rank(), "rows", len(items)))
        return super().loss(items, policy)


def rows_on_ranks(micro_batches, batches, given):
    """What each of two ranks notes; ``batches``: the sample indices of each rank's only batch."""
    Rows.seen.clear()

    def work(world):
        policy = line_policy(0, micro_batch=micro_batches[world.rank])
        indices = batches[world.rank]
        batch, tools = of([1.0] * len(indices), sample_index=indices)(policy)
        source = [(batch, replace(tools, world=world))]
        train(Rows(), policy, descending(policy, world=world), source, given, Steps())

    on_ranks(2, work)
    return [[note[1:] for note in Rows.seen if note[0] == rank] for rank in range(2)]


def test_no_rank_computes_a_loss_of_no_rows():
    # rank 0 has no sample of the second part, and rank 1 none of the first
    found = rows_on_ranks([4, 4], [[0, 2], [1, 3]], settings(2, steps_per_batch=2))
    assert found == [
        [("micro-batch", 4), ("rows", 2), ("rows", 1)],
        [("micro-batch", 4), ("rows", 1), ("rows", 2)],
    ]


def test_ranks_go_on_with_the_smallest_of_their_micro_batches():
    """One of them may have halved its own while it drew images."""
    found = rows_on_ranks([4, 2], [[0, 1, 2], [3, 4, 5]], settings(1))
    assert found == [[("micro-batch", 2), ("rows", 2), ("rows", 1)]] * 2


def test_a_rollout_keeps_its_lowered_weights():
    nested = []

    class Looking(Pull):
        def collect(self, batch, tools):
            nested.append(torch.autocast_decrement_nesting())
            torch.autocast_increment_nesting()
            return super().collect(batch, tools)

    trained([of([1])], settings(1), policy=line_policy(autocast=torch.bfloat16), algorithm=Looking())
    assert nested == [0]


def test_the_items_of_a_batch_are_gone_before_the_next_are_collected():
    alive = []

    class Looking(Pull):
        def collect(self, batch, tools):
            alive.append(sum(item() is not None for item in kept))
            items = super().collect(batch, tools)
            kept.append(weakref.ref(items.x))
            return items

    kept = []
    trained([of([1, 2])] * 4, settings(4), algorithm=Looking())
    trained([of([1, 2])] * 2, settings(4, steps_per_batch=2), algorithm=Looking())
    assert alive == [0] * 6


def rates(steps, **more):
    return [learning_rate(Train(steps=steps, learning_rate=8.0, **more), step) for step in range(steps)]


def test_learning_rates_of_every_schedule_in_closed_form():
    assert rates(3) == [8, 8, 8]
    assert rates(4, schedule="linear") == [8, 6, 4, 2]
    assert rates(4, schedule="cosine") == pytest.approx([8, 4 + 8**0.5, 4, 4 - 8**0.5])
    assert rates(6, schedule="linear", warmup_steps=2) == [4, 8, 8, 6, 4, 2]
    assert rates(6, schedule="constant", warmup_steps=4) == [2, 4, 6, 8, 8, 8]
    assert rates(7, schedule="cosine", warmup_steps=4) == pytest.approx([2, 4, 6, 8, 8, 6, 2])
    assert math.isclose(learning_rate(Train(steps=1), 0), 2e-5)


def test_roles_have_the_names_that_checkpoints_and_artifacts_know():
    assert (trainer.EMA, trainer.REFERENCE) == ("ema", "reference")


NAN = math.nan


def test_a_refused_step_moves_nothing_and_keeps_its_number_and_learning_rate():
    given = settings(3, schedule="linear", ema=0.5)  # lr 1, 2/3, 1/3
    policy = line_policy(0)
    policy.add_role(EMA)
    watch, policy, drawn = trained([of([1.0]), of([2, NAN]), of([1.0])], given, policy=policy)
    assert policy.trained["a"].item() == pytest.approx(-(1 + 1 / 3))
    assert policy.roles[EMA]["a"].item() == pytest.approx(-0.5 * 0.5 - 0.5 * 4 / 3), "it moved twice"
    assert [step for step, *_ in watch.told] == [1, 3]
    assert [step for step, _ in noted("after")] == [1, 3], "no role moves after a batch without a step"
    assert (watch.asked, drawn) == ([0, 1, 2], 3)
    ((step, words, samples),) = watch.not_taken
    assert (step, words) == (
        2,
        "the loss (nan) or the gradient's norm (nan) is not finite; the step was not taken",
    )
    assert [(s["id"], s["sample"], math.isnan(s["x"])) for s in samples] == [(1, 1, True)]


def test_the_other_steps_on_a_batch_are_taken():
    given = settings(2, steps_per_batch=2)
    watch, policy, _ = trained([of([NAN, 2, 1, 4])], given, policy=line_policy(0, micro_batch=2))
    assert policy.trained["a"].item() == pytest.approx(-3)
    assert ([step for step, *_ in watch.told], [step for step, *_ in watch.not_taken]) == ([2], [1])
    assert [step for step, _ in noted("after")] == [2]
    assert noted("check") == [[-1.0, -1.0]], "the weights are still those that collected the items"


def test_a_batch_that_cannot_be_collected_refuses_all_its_steps():
    class Unscored(Pull):
        def collect(self, batch, tools):
            if not batch.latents.isfinite().all():
                raise StepRefused("a reward", [{"sample": 0}])
            return super().collect(batch, tools)

    given = settings(4, steps_per_batch=2)
    watch, policy, drawn = trained(
        [of([NAN, 2]), of([1, 1])], given, policy=line_policy(0), algorithm=Unscored()
    )
    assert [(step, samples) for step, _, samples in watch.not_taken] == [
        (1, [{"id": 0, "sample": 0}]),
        (2, [{"id": 0, "sample": 0}]),
    ]
    assert policy.trained["a"].item() == pytest.approx(-2)
    assert (watch.asked, drawn) == ([0, 2], 2)
    assert [step for step, *_ in watch.told] == [3, 4]
