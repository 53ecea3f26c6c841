import tracemalloc

import numpy as np
import pytest

from posttrain.evaluation.intervals import bootstrap_interval, paired_difference


def test_a_95_percent_interval_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(1)
    bounds = [bootstrap_interval(rng.normal(3, 2, 60), resamples=400, seed=i) for i in range(300)]
    covered = np.mean([low <= 3 <= high for low, high in bounds])
    assert 0.90 <= covered <= 0.98


def test_the_width_is_that_of_the_normal_theory():
    values = np.random.default_rng(0).normal(0, 1, 4000)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(4000), rel=0.08)
    assert low < values.mean() < high


def test_a_lower_level_gives_a_narrower_interval_inside():
    values = np.random.default_rng(0).exponential(1, 200)
    low, high = bootstrap_interval(values, level=0.95)
    inner_low, inner_high = bootstrap_interval(values, level=0.5)
    assert low < inner_low < inner_high < high


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_copies_of_an_image_add_no_certainty_when_its_prompt_is_the_group():
    once = np.random.default_rng(0).normal(size=40)
    prompts = np.repeat(np.arange(40), 25)
    assert bootstrap_interval(np.repeat(once, 25), groups=prompts) == pytest.approx(bootstrap_interval(once))
    low, high = bootstrap_interval(once)
    ungrouped_low, ungrouped_high = bootstrap_interval(np.repeat(once, 25))
    assert ungrouped_high - ungrouped_low < 0.4 * (high - low)


def test_the_mean_is_over_values_where_groups_differ_in_size():
    low, high = bootstrap_interval([0.0] + [1.0] * 99, groups=["small"] + ["large"] * 99)
    assert (low, high) == (0.0, 1.0)  # either group may be drawn alone
    values, groups = (
        np.r_[np.zeros(100), np.ones(900)],
        np.r_[np.repeat(range(10), 10), np.repeat(range(10, 100), 10)],
    )
    low, high = bootstrap_interval(values, groups=groups)
    assert low < 0.9 < high


def test_groups_need_not_be_sorted_nor_numbers():
    values = np.random.default_rng(0).normal(size=12)
    names = np.array(["a", "b", "c"] * 4)
    order = np.argsort(names, kind="stable")
    assert bootstrap_interval(values, groups=names) == pytest.approx(
        bootstrap_interval(values[order], groups=names[order])
    )


@pytest.mark.parametrize("value", [0.1, -3.0, 0.0])
def test_one_value_is_its_own_interval(value):
    assert bootstrap_interval([value]) == (value, value)


@pytest.mark.parametrize("values", [[], np.zeros((2, 2))])
def test_what_is_no_list_of_values_is_refused(values):
    with pytest.raises(ValueError, match="bootstrap needs a list of values"):
        bootstrap_interval(values)


def test_labels_that_are_not_one_a_value_are_refused():
    with pytest.raises(ValueError):
        bootstrap_interval([1.0, 2.0, 3.0], groups=["a", "b"])


def test_ten_thousand_values_stay_below_200_mb():
    tracemalloc.start()
    bootstrap_interval(np.zeros(10_000), resamples=500)  # a chunk holds 200 resamples
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_pairs_find_a_small_gain_that_two_separate_intervals_hide():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, 100)
    after = before + 0.1 + rng.normal(0, 0.1, 100)
    mean, low, high = paired_difference(before, after)
    assert mean == pytest.approx((after - before).mean())
    assert 0 < low < mean < high
    assert bootstrap_interval(after)[0] < bootstrap_interval(before)[1]


def test_a_difference_is_second_less_first():
    mean, low, high = paired_difference([1.0, 2.0], [4.0, 5.0])
    assert (mean, low, high) == (3.0, 3.0, 3.0)


def test_pairs_are_drawn_by_group():
    before, after = np.zeros(40), np.random.default_rng(0).normal(size=4).repeat(10)
    _, low, high = paired_difference(before, after)
    _, wide_low, wide_high = paired_difference(before, after, groups=np.repeat(range(4), 10))
    assert wide_high - wide_low > 2 * (high - low)


def test_unequal_lengths_are_no_pairs():
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference([1.0], [1.0, 2.0])


def test_a_long_prompt_takes_its_own_room_alone():
    groups = [f"prompt {n}" for n in range(2000)] + ["x" * 20_000]
    tracemalloc.start()
    bootstrap_interval(np.zeros(2001), groups=groups, resamples=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000, "each as long as the longest they would be 160 MB"
