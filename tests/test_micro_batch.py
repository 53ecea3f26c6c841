"""Tests how a micro-batch is remembered, and how it is found by trying, on trials with given numbers."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lines import Pull, descending, line_policy
from ranks import on_ranks

from posttrain.distributed.world import ALONE
from posttrain.engine import micro_batch, trial
from posttrain.engine.micro_batch import (
    Size,
    Trial,
    items_in_step,
    largest_micro_batch,
    one_trial,
    sizes_tried,
    trials_in_words,
)
from posttrain.errors import TrainingError
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.policy.out_of_memory import OutOfMemory
from posttrain.stages import micro_batch as settled_micro_batch
from posttrain.stages.micro_batch import remember, set_damaged_aside, settled

RECIPE = SimpleNamespace(device="cpu", parallel=Single())
LACK = torch.OutOfMemoryError("CUDA out of memory")


def stage(given="auto", algorithm=None, **train):
    return SimpleNamespace(train=Train(steps=4, micro_batch=given, **train), algorithm=algorithm or Pull())


def test_what_the_recipe_says_is_taken_where_nothing_was_found(tmp_path):
    assert settled(RECIPE, stage(5), tmp_path, 1) == 5
    assert settled(RECIPE, stage("auto"), tmp_path, 1) is None


@pytest.mark.parametrize(("given", "found", "taken"), [("auto", 6, 6), (8, 6, 6), (4, 6, 4)])
def test_what_was_found_is_taken_up_to_what_the_recipe_says(tmp_path, given, found, taken):
    remember(RECIPE, tmp_path, 1, found)
    assert settled(RECIPE, stage(given), tmp_path, 1) == taken


def test_what_is_remembered_belongs_to_processes_strategy_and_device(tmp_path, monkeypatch):
    remember(RECIPE, tmp_path, 2, 6, [Trial(2, 1.5, 7), Trial(6, 2.5, 9)])
    assert [p.name for p in tmp_path.iterdir()] == ["micro_batch.json"]
    assert json.loads((tmp_path / "micro_batch.json").read_text()) == {
        "device": "cpu",
        "parallel": {"strategy": "single"},
        "processes": 2,
        "micro_batch": 6,
        "trials": [
            {"items": 2, "items_per_second": 1.5, "bytes": 7},
            {"items": 6, "items_per_second": 2.5, "bytes": 9},
        ],
    }
    other = SimpleNamespace(device="cpu", parallel=Single.model_construct(strategy="other"))
    assert settled(RECIPE, stage(), tmp_path, 2) == 6
    assert settled(RECIPE, stage(), tmp_path, 1) is None
    assert settled(other, stage(), tmp_path, 2) is None
    monkeypatch.setattr(settled_micro_batch, "resolve", lambda name: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"A GPU of {device}")
    assert settled(RECIPE, stage(), tmp_path, 2) is None
    parallel = SimpleNamespace(model_dump=lambda mode="python": {"mode": mode})
    remember(SimpleNamespace(device="cuda", parallel=parallel), tmp_path, 2, 4)
    assert json.loads((tmp_path / "micro_batch.json").read_text())["parallel"] == {"mode": "json"}
    remember(RECIPE, tmp_path, 2, 3)
    assert json.loads((tmp_path / "micro_batch.json").read_text())["device"] == "A GPU of cuda:1"
    assert settled(RECIPE, stage(), tmp_path, 2) == 3
    assert "trials" not in json.loads((tmp_path / "micro_batch.json").read_text())


@pytest.mark.parametrize("number", [0, -1, 1.5, "2", True, None])
def test_a_number_that_is_none_is_not_remembered(tmp_path, number):
    remember(RECIPE, tmp_path, 1, 1)
    assert settled(RECIPE, stage(), tmp_path, 1) == 1
    whole = json.loads((tmp_path / "micro_batch.json").read_text())
    (tmp_path / "micro_batch.json").write_text(json.dumps({**whole, "micro_batch": number}))
    assert settled(RECIPE, stage(), tmp_path, 1) is None


DAMAGE = {
    "empty": b"",
    "no text": b"\xff",
    "a list": b"[]",
    "no size": b"{}",
    "a size that is none": b'{"micro_batch": 0}',
    "modes that are none": b'{"micro_batch": 2, "modes": [{"given": []}]}',
    "modes that are no list": b'{"micro_batch": 2, "modes": null}',
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_memory_is_named_and_set_aside(tmp_path, content):
    notes, file = [], tmp_path / "micro_batch.json"
    set_damaged_aside(tmp_path, notes.append)
    remember(RECIPE, tmp_path, 1, 1)
    set_damaged_aside(tmp_path, notes.append)
    assert notes == []
    file.write_bytes(content)
    set_damaged_aside(tmp_path, notes.append)
    set_damaged_aside(tmp_path, notes.append)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [content]
    (line,) = notes
    assert line.startswith(f"{str(file)!r} is damaged: ")
    assert line.endswith("; it is now 'micro_batch.damaged.json', and what it held is found again by trying")


class Three(Pull):
    """Makes three items of each sample, says the stand-in for its rehearsal."""


class Trials:
    """Trials whose rows take ``bytes_each``, and gain speed up to ``fastest`` rows; ``room`` rows fit."""

    def __init__(self, monkeypatch, rows=1, fastest=64, each=1000, room=10**9, free=None, base=0):
        self.tried, self.ended = [], []
        self.fastest, self.each, self.room, self.base = fastest, each, room, base
        monkeypatch.setattr(trial, "timed", self.timed)
        monkeypatch.setattr(
            micro_batch,
            "rehearse",
            lambda algorithm, rule=None: SimpleNamespace(
                rows_with=rows, items=3.0 if isinstance(algorithm, Three) else 1.0
            ),
        )
        monkeypatch.setattr(micro_batch, "available_memory", lambda device: free)
        monkeypatch.setattr(micro_batch.gc, "collect", lambda: self.ended.append("collect"))
        for name in ("free_memory", "reset_peak_memory"):
            monkeypatch.setattr(micro_batch, name, lambda device, name=name: self.ended.append(name))

    def timed(self, policy, strategy, sample, rows):
        assert sample == "sample"
        self.tried.append(rows)
        if rows > self.room:
            raise LACK
        return rows / min(rows, self.fastest) / 8, self.base + self.each * rows


def found(made=None, world=ALONE, alone=True, state=None, policy=None, **first):
    policy = policy or line_policy()
    strategy = descending(policy, world=world)
    strategy.tries_alone = alone
    strategy.optimizer.state.update(state or {})
    made = made or stage(batch_size=32)
    return largest_micro_batch(made.algorithm, made.train, policy, strategy, "sample", **first)


def test_numbers_are_doubled_as_long_as_they_pay(monkeypatch):
    trials = Trials(monkeypatch, fastest=4)
    assert found() == Size(4, [Trial(1, 8.0, 1000), Trial(2, 16.0, 2000), Trial(4, 32.0, 4000)], False)
    assert trials.tried == [1, 2, 4, 8]
    assert trials.ended == ["collect", "free_memory", "reset_peak_memory"]


def test_no_further_size_is_tried_once_the_time_is_over(monkeypatch):
    trials, policy = Trials(monkeypatch), line_policy()
    made, asked = stage(batch_size=32), []

    def expired():
        asked.append(len(trials.tried))
        return len(trials.tried) == 2

    strategy = descending(policy)
    size = largest_micro_batch(made.algorithm, made.train, policy, strategy, "sample", 4, expired)
    assert (size.items, len(size.trials), size.crowded, asked) == (8, 2, False, [1, 2])
    assert trials.tried == [4, 8]


@pytest.mark.parametrize(("gain", "rate", "number"), [(1.05, 1.06, 2), (1.05, 1.04, 1), (1.25, 1.25, 2)])
def test_twice_as_many_must_be_a_twentieth_faster(monkeypatch, gain, rate, number):
    Trials(monkeypatch)
    assert (micro_batch.GAIN, micro_batch.FILLED) == (1.05, 0.9)
    monkeypatch.setattr(micro_batch, "GAIN", gain)
    monkeypatch.setattr(trial, "timed", lambda policy, strategy, sample, rows: ({1: 1, 2: 2 / rate}[rows], 0))
    size = found(stage(batch_size=2))
    assert (size.items, size.crowded) == (number, False)


@pytest.mark.parametrize(
    ("train", "algorithm", "number", "rows"),
    [
        ({"batch_size": 32}, None, 32, 1),
        ({"batch_size": 31}, None, 16, 1),
        ({"batch_size": 1}, None, 1, 2),
        ({"batch_size": 32, "steps_per_batch": 4}, None, 8, 2),
        ({"batch_size": 6}, Three(), 16, 2),  # 18 items
        ({"batch_size": 6, "steps_per_batch": 2}, Three(), 8, 1),  # 9
    ],
)
def test_no_more_are_tried_than_a_step_has(monkeypatch, train, algorithm, number, rows):
    train = {"checkpoint_every": 4, "sample_every": None, **train}
    trials = Trials(monkeypatch, rows=rows, fastest=10**6)
    assert found(stage(algorithm=algorithm, **train)).items == number
    assert trials.tried == [rows * 2**i for i in range(number.bit_length())]


# expected for 2 n items after n: 1000 n + 2 * 500 n, half of it before, and 8 bytes for the weight
@pytest.mark.parametrize(
    ("free", "number"),
    [
        (8008 / 0.9 + 1, 8),
        (8008 / 0.9 - 1, 4),
        (4008 / 0.9 + 1, 4),
        (2008 / 0.9 + 1, 2),
        (2008 / 0.9 - 1, 1),
        (1, 1),
    ],
)
def test_what_is_likely_not_to_fit_is_not_tried(monkeypatch, free, number):
    # 1 item: 1000 bytes, so 2 are expected to take twice that; 4 after 2: 2000 + 2 * 1000
    trials = Trials(monkeypatch, free=free, fastest=10**6)
    size = found()
    assert (size.items, size.crowded) == (number, True)
    assert max(trials.tried) == number


def test_moments_are_two_numbers_of_4_bytes_a_weight(monkeypatch):
    for more, number in ((1, 2), (-1, 1)):
        Trials(monkeypatch, free=(2000 + 80) / 0.9 + more)
        policy = line_policy()
        policy.model.transformer.a = torch.nn.Parameter(torch.ones(10))
        policy.find_parameters()
        assert found(policy=policy).items == number


def test_moments_that_are_there_already_need_no_more_room(monkeypatch):
    Trials(monkeypatch, free=2000 / 0.9 + 1)
    assert found().items == 1
    assert found(state={torch.zeros(1): {"step": 1}}).items == 2


@pytest.mark.parametrize(("free", "number"), [(5000, 4), (4999, 2), (4000, 2), (3999, 1)])
def test_what_every_size_takes_is_not_expected_twice(monkeypatch, free, number):
    # 1 item: 2000 bytes, so 2 are expected to take at most 4000; they take 3000, so 4 are expected to take 5000
    monkeypatch.setattr(micro_batch, "FILLED", 1.0)
    Trials(monkeypatch, each=1000, base=1000, free=free)
    assert found(state={torch.zeros(1): {}}).items == number


def test_trials_that_took_no_more_than_those_before_are_expected_to_go_on_so(monkeypatch):
    # 1: 900, then max(-100, 0) more for each doubling; the first doubling is 900 + 900
    Trials(monkeypatch, each=-100, base=1000, free=1000 / 0.9)
    assert found(state={torch.zeros(1): {}}).items == 1
    Trials(monkeypatch, each=0, base=300, free=600 / 0.9 + 1)
    assert found(stage(batch_size=8), state={torch.zeros(1): {}}).items == 8


@pytest.mark.parametrize("room", [2, 3])
def test_what_ran_out_of_memory_ends_the_search(monkeypatch, room):
    trials = Trials(monkeypatch, room=room)
    assert found().items == 2
    assert trials.tried == [1, 2, 4]
    assert trials.ended == ["collect", "free_memory", "reset_peak_memory"]


@pytest.mark.parametrize("alone", [True, False])
def test_one_item_that_does_not_fit_is_an_error(monkeypatch, alone):
    Trials(monkeypatch, room=0)
    with pytest.raises(TrainingError, match=r"^out of memory with one item at a time \(CUDA out") as error:
        found(alone=alone)
    assert not isinstance(error.value, OutOfMemory)
    assert error.value.__cause__ is (None if alone else LACK)


@pytest.mark.parametrize("room", [0, 4])
def test_ranks_that_try_alone_agree_on_what_fits_where_one_of_them_lacks_memory(monkeypatch, room):
    Trials(monkeypatch)

    def timed(policy, strategy, sample, rows):
        if strategy.world.rank == 1 and rows > room:
            raise LACK
        return 1.0, rows

    def work(world):
        try:
            return found(world=world).items
        except TrainingError as error:
            return str(error)[:38]
        finally:
            assert world.gather_objects("next") == ["next", "next"], "what follows is paired"

    monkeypatch.setattr(trial, "timed", timed)
    assert on_ranks(2, work) == [4 if room else "out of memory with one item at a time "] * 2


def test_other_errors_are_passed_on(monkeypatch):
    Trials(monkeypatch)
    monkeypatch.setattr(trial, "timed", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match=r"^shapes$"):
        found()


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_weights_are_waited_for_the_search_stops_the_run(monkeypatch, ranks):
    Trials(monkeypatch, room=4)

    def work(world):
        with pytest.raises(OutOfMemory, match="with 8 rows at a time") as error:
            found(world=world, alone=False)
        assert error.value.__cause__ is LACK
        return error.value.micro_batch

    assert on_ranks(ranks, work) == [4] * ranks


def test_ranks_share_a_step_and_take_what_the_slowest_and_fullest_can(monkeypatch):
    trials = Trials(monkeypatch)

    def timed(policy, strategy, sample, rows):
        rank = strategy.world.rank
        return (1.0, 0.25)[rank], (100, 300)[rank] * rows

    monkeypatch.setattr(trial, "timed", timed)
    results = on_ranks(2, lambda world: found(stage(batch_size=8), world))
    assert results == [Size(4, [Trial(n, n / 1.0, 300 * n) for n in (1, 2, 4)], False)] * 2
    monkeypatch.setattr(micro_batch, "available_memory", lambda device: 10 * dist.get_rank() or None)
    sizes = on_ranks(2, lambda world: found(stage(batch_size=8), world))
    assert [(size.items, size.crowded) for size in sizes] == [(1, True), (1, True)]
    assert trials.tried == []
    assert [s.items for s in on_ranks(2, lambda world: found(stage(batch_size=1), world))] == [1, 1]


def test_what_was_found_in_a_line():
    trials = [Trial(1, 8.0, 1000), Trial(2, 15.123, 2000), Trial(4, 30.0, 2_500_000)]
    words = "micro_batch auto is 4 (1: 8/s, 2: 15.1/s, 4: 30/s"
    assert trials_in_words(trials, torch.device("cpu")) == f"{words})"
    assert trials_in_words(trials, torch.device("cuda")) == f"{words}; 2.5 MB more memory than at rest)"
    assert sizes_tried(trials[1:], torch.device("cpu")) == "2: 15.1/s, 4: 30/s"


@pytest.mark.parametrize(
    ("first", "room", "tried", "number", "crowded"),
    [
        (8, 64, [8, 16, 32], 32, False),
        (3, 64, [3, 6, 12, 24], 24, False),
        (40, 64, [32], 32, False),  # no more than a step has
        (4, 8, [4, 8, 16], 8, True),
        (32, 5, [32, 16, 8, 4], 4, True),
        (12, 5, [12, 6, 3], 3, True),
        (8, 1, [8, 4, 2, 1], 1, True),
    ],
)
def test_sizes_begin_with_the_first_or_with_the_largest_of_its_halves_that_fits(
    monkeypatch, first, room, tried, number, crowded
):
    trials = Trials(monkeypatch, room=room)
    size = found(first=first)
    told = size.trials
    assert (size.items, trials.tried) == (number, tried), "what did not fit is not tried again"
    assert size.crowded is crowded
    assert told[0].items == min(t for t in tried if t <= room)
    assert told[-1].items == number
    assert all(type(trial.items) is int for trial in told)
    assert trials.ended == ["collect", "free_memory", "reset_peak_memory"]


def test_a_first_of_which_not_even_one_fits_is_an_error(monkeypatch):
    trials = Trials(monkeypatch, room=0)
    with pytest.raises(TrainingError, match=r"^out of memory with one item at a time"):
        found(first=4)
    assert trials.tried == [4, 2, 1]


def test_a_first_that_ends_the_run_leaves_half_of_it(monkeypatch):
    Trials(monkeypatch, room=4)
    with pytest.raises(OutOfMemory) as error:
        found(first=7, alone=False)
    assert error.value.micro_batch == 3
    with pytest.raises(OutOfMemory) as error:
        found(first=3, alone=False)
    assert error.value.micro_batch == 3, "which fitted before six did not"


@pytest.mark.parametrize(
    ("batch_size", "steps", "algorithm", "size", "items"),
    [(31, 1, Pull(), 1, 31), (31, 4, Pull(), 2, 3), (5, 2, Three(), 1, 7), (2, 1, Pull(), 4, 1)],
)
def test_the_items_of_a_step_on_one_of_the_processes(monkeypatch, batch_size, steps, algorithm, size, items):
    Trials(monkeypatch)
    train = Train(
        steps=4, batch_size=batch_size, steps_per_batch=steps, checkpoint_every=4, sample_every=None
    )
    strategy = SimpleNamespace(world=SimpleNamespace(size=size))
    found = items_in_step(algorithm, train, strategy)
    assert (found, type(found)) == (items, int)


def one(items, alone=True):
    policy = line_policy()
    strategy = descending(policy)
    strategy.tries_alone = alone
    return one_trial(Pull(), items, policy, strategy, "sample")


def test_one_trial_is_of_that_many_items_or_says_that_they_do_not_fit(monkeypatch):
    trials = Trials(monkeypatch, rows=2, room=12, each=10)
    assert one(6) == Trial(6, 6 / (1 / 8), 120)
    assert trials.tried == [12]
    with pytest.raises(TrainingError, match=r"^out of memory with 7 items at a time$") as error:
        one(7)
    assert not isinstance(error.value, OutOfMemory)
    assert trials.tried == [12, 14]
    with pytest.raises(OutOfMemory) as error:
        one(7, alone=False)
    assert error.value.micro_batch == 3
