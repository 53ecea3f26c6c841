"""The bootstrap's numbers are those of a plain loop over the same draws, and its defaults are the documented ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.evaluation import intervals as statistics
from posttrain.evaluation.intervals import bootstrap_interval, paired_difference

VALUES = [1.0, 2.0, 4.0, 9.0, -3.0]


def by_hand(values, groups=None, level=0.95, resamples=2000, seed=0):
    """Draw groups with replacement, pool their values, and take the quantiles of the pooled means."""
    names = list(range(len(values))) if groups is None else list(groups)
    members = [[v for v, g in zip(values, names, strict=True) if g == name] for name in sorted(set(names))]
    if len(members) == 1:
        members = [[v] for v in values]
    draws = np.random.default_rng(seed).integers(len(members), size=(resamples, len(members)))
    means = [np.mean([v for i in row for v in members[i]]) for row in draws]
    return np.quantile(means, (1 - level) / 2), np.quantile(means, (1 + level) / 2)


def test_the_defaults_are_95_percent_of_2000_resamples_of_seed_0():
    values = np.random.default_rng(3).normal(size=20).tolist()
    assert bootstrap_interval(values) == pytest.approx(by_hand(values), rel=1e-9)
    low, high = bootstrap_interval([0.0, 1.0])
    assert (low, high) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.4) == (0.5, 0.5), "half of the means are 0.5"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=8),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.sampled_from([0.5, 0.8, 0.99]),
    st.integers(1, 60),
    st.integers(0, 5),
)
def test_any_interval_is_that_of_a_loop(values, labels, level, resamples, seed):
    groups = labels[: len(values)]
    arguments = {"level": level, "resamples": resamples, "seed": seed}
    got = bootstrap_interval(values, groups=groups, **arguments)
    assert got == pytest.approx(by_hand(values, groups, **arguments), abs=1e-9)


def test_chunks_change_nothing(monkeypatch):
    whole = bootstrap_interval(VALUES, resamples=101)
    for chunk in (1, 5, 12, 10**6):  # less than one resample, one, two with a rest, all
        monkeypatch.setattr(statistics, "VALUES_AT_ONCE", chunk)
        assert bootstrap_interval(VALUES, resamples=101) == whole


def test_no_more_resampled_values_than_a_chunk_are_held(monkeypatch):
    sizes, make = [], np.random.default_rng

    class Watched:
        def __init__(self, seed):
            self.rng = make(seed)

        def integers(self, high, size):
            sizes.append(size)
            return self.rng.integers(high, size=size)

    monkeypatch.setattr(np.random, "default_rng", Watched)
    monkeypatch.setattr(statistics, "VALUES_AT_ONCE", 12)
    bootstrap_interval(VALUES, resamples=7)
    assert sizes == [(2, 5), (2, 5), (2, 5), (1, 5)]
    sizes.clear()
    monkeypatch.setattr(statistics, "VALUES_AT_ONCE", 4)
    bootstrap_interval(VALUES, resamples=2)
    assert sizes == [(1, 5), (1, 5)], "one resample at least"


def test_a_chunk_is_two_million_values():
    assert statistics.VALUES_AT_ONCE == 2_000_000


def test_the_values_of_a_single_group_are_drawn_one_by_one():
    assert bootstrap_interval(VALUES, groups=["p"] * 5) == bootstrap_interval(VALUES)


def test_the_interval_of_a_difference_is_that_of_its_pairs():
    before, after, groups = [1.0, 5.0, 2.0, 2.0], [2.0, 5.5, 1.0, 7.0], ["a", "b", "b", "c"]
    mean, *bounds = paired_difference(before, after, groups=groups)
    assert mean == 1.375
    assert bounds == pytest.approx(by_hand([1.0, 0.5, -1.0, 5.0], groups))
    narrow = paired_difference(before, after, level=0.5)[1:]
    assert narrow == pytest.approx(by_hand([1.0, 0.5, -1.0, 5.0], level=0.5))


def test_one_pair_has_no_interval():
    assert paired_difference([1.0], [1.5]) == (0.5, -np.inf, np.inf)
    assert paired_difference([1.0, 2.0], [1.5, 2.5], groups=["a", "a"]) == (0.5, 0.5, 0.5)


def test_shapes_in_the_messages_are_those_given():
    with pytest.raises(ValueError, match=r"pairs need equal lengths, not \(1,\) and \(2,\)"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"not an array of shape \(2, 3\)"):
        bootstrap_interval(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"not an array of shape \(0,\)"):
        bootstrap_interval([])
