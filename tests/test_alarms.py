"""Tests when the alarms of a stage sound, on readings whose means and errors are worked out by hand."""

from math import inf

import pytest
from pydantic import ValidationError

from posttrain.engine.monitor import BATCHES, Monitor, collapsed, hacking

# differences -1 and -3: mean -2, standard deviation sqrt(2), standard error 1: just not more than two errors
EDGE = ({"score": [5.0, 5.0]}, {"score": [4.0, 2.0]})
# differences -1.1 and -3: mean -2.05, error 0.95
BEYOND = ({"score": [5.0, 5.0]}, {"score": [3.9, 2.0]})


def test_a_fall_is_told_from_more_than_two_standard_errors():
    assert hacking([0.25, 0.5], EDGE, 2) is None
    assert hacking([0.25, 0.5], BEYOND, 2) == (
        "the training reward rose from 0.25 to 0.5 while the held-out score 'score' became worse by 2.05 "
        "(+- 0.95): reward hacking?"
    )
    assert hacking([0.25, 0.5], BEYOND[::-1], 2) is None, "it rose"


def test_the_error_of_four_is_their_deviation_by_the_root_of_four():
    # differences -3, -1, -3, -1: mean -2, deviation sqrt(4/3), error 0.577; of -2 +- 1.155
    assert hacking([0, 1], ({"s": [3.0, 1, 3, 1]}, {"s": [0.0] * 4}), 2) is not None
    # 3 of 4 fall by 1, one rises by 1: mean -0.5, error 0.5
    assert hacking([0, 1], ({"s": [1.0, 1, 1, 0]}, {"s": [0.0, 0, 0, 1]}), 2) is None


@pytest.mark.parametrize(
    ("rewards", "sounds"),
    [
        ([0.0, 9.0, 1.0], True),  # the first of the window, not the one before the last
        ([2.0, 0.0, 1.0], False),
        ([1.0, 0.0, 1.0], False),  # as much is no rise
        ([-inf, 0.0, 1.0], False),  # there was no batch before the first reading
        ([9.0, 0.5, 9.0, 1.0], True),  # what was before the window does not count
    ],
)
def test_the_reward_must_have_risen_within_the_window(rewards, sounds):
    readings = [BEYOND[0]] * (len(rewards) - 1) + [BEYOND[1]]
    assert (hacking(rewards, readings, 3) is not None) is sounds


def test_the_score_must_have_fallen_within_the_window():
    low, high = {"s": [0.0, 0.1]}, {"s": [1.0, 1.1]}
    assert hacking([0, 1, 2], [high, low, low], 3)
    assert hacking([0, 1, 2], [low, high, low], 3) is None
    assert hacking([0, 1, 2, 3], [high, low, low, low], 3) is None
    assert hacking([0, 1, 2, 3], [low, high, low, low], 3)
    assert hacking([0, 1], [high, low], 3) is None, "there are too few"
    assert hacking([0, 1], [high, low], 2)


def test_every_score_that_has_an_error_may_sound():
    first = {"one": [9.0], "same": [1.0, 2.0], "worse": [9.0, 9.0]}
    last = {"one": [0.0], "same": [1.0, 2.0], "worse": [1.0, 2.0]}
    assert "'worse' became worse by 7.5 (+- 0.5)" in hacking([0, 1], [first, last], 2)
    assert hacking([0, 1], [{"one": [9.0]}, {"one": [0.0]}], 2) is None
    with pytest.raises(ValueError, match="zip"):
        hacking([0, 1], [{"s": [1.0, 2.0]}, {"s": [1.0, 2.0, 3.0]}], 2)


def test_a_collapse_is_less_than_its_fraction_of_the_first_spread():
    assert BATCHES == 5
    first = [1.0, 3.0, 2.0, 2.0, 2.0]  # mean 2
    middle = [0.0] * 4
    assert collapsed(first + [0.5] * 5, 0.25) is None, "as much is no collapse"
    assert collapsed([*first, 0.25, 0.75, 0.5, 0.5, 0.25], 0.25) == (
        "the reward's spread within groups fell from 2 to 0.45: "
        "samples of a prompt have become alike, or all have the highest reward"
    )
    assert collapsed(first + middle + [2.0] * 5, 0.25) is None, "the last five count"
    assert collapsed([2.0] * 5 + [9.0] * 3 + [0.1] * 5, 0.25), "the first five count"
    assert collapsed([2.0] * 5 + [0.0] * 4, 0.25) is None, "too few"
    assert collapsed([0.0] * 10, 0.25) is None, "there was no spread to lose"


def test_the_monitor_by_default_and_its_bounds():
    made = Monitor()
    assert (made.every, made.prompts, made.window, made.spread_fraction) == (50, 48, 3, 0.1)
    assert (made.reward_hacking, made.spread_collapse) == ("warn", "warn")
    assert Monitor(every=1, prompts=2, window=2, spread_fraction=0.99, reward_hacking="rollback").window == 2
    for bad in (
        {"every": 0},
        {"prompts": 1},
        {"window": 1},
        {"spread_fraction": 0.0},
        {"spread_fraction": 1.0},
        {"reward_hacking": "shout"},
        {"spread_collapse": "shout"},
    ):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            Monitor.model_validate(bad)
