"""Computes bootstrap intervals of means and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

VALUES_AT_ONCE = 2_000_000
"""How many resampled values are in memory at a time."""


def bootstrap_interval(
    values: ArrayLike,
    *,
    groups: Iterable[Any] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of ``values`` (n,) (Efron & Tibshirani 1993, chapter 13).

    ``groups`` (n,) gives each value a label. Then whole groups are drawn, because the images of one prompt
    are not independent; the mean is still the one over all values. A single group is ignored. Raises
    ValueError if there are no values.
    """
    flat = np.asarray(values, float)
    if flat.ndim != 1 or not len(flat):
        raise ValueError(f"a bootstrap needs a list of values, not an array of shape {flat.shape}")
    labels = np.arange(len(flat)) if groups is None else _numbered(groups)
    if not labels.any():
        labels = np.arange(len(flat))  # each resample would be the single group, without any spread
    sums, counts = np.bincount(labels, flat), np.bincount(labels)
    rng, means = np.random.default_rng(seed), []
    step = max(1, VALUES_AT_ONCE // len(sums))
    for start in range(0, resamples, step):
        drawn = rng.integers(len(sums), size=(min(step, resamples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _numbered(groups: Iterable[Any]) -> NDArray[np.int64]:
    """The number of each group among all, sorted.

    numpy would sort them too, but gives each of its texts as many bytes as the longest one: gigabytes for one
    long prompt among many.
    """
    each = list(groups)
    number = {group: n for n, group in enumerate(sorted(set(each)))}
    return np.array([number[group] for group in each])


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, groups: Iterable[Any] | None = None, level: float = 0.95
) -> tuple[float, float, float]:
    """The mean of ``b - a``, both (n,), over pairs, and its interval as of :func:`bootstrap_interval`.

    One pair alone does not tell how much others would differ: its interval is from -inf to inf. Raises
    ValueError if the lengths differ.
    """
    first, second = np.asarray(a, float), np.asarray(b, float)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, not {first.shape} and {second.shape}")
    difference: NDArray[np.float64] = second - first
    low, high = bootstrap_interval(difference, groups=groups, level=level)
    if len(difference) == 1:
        low, high = -math.inf, math.inf
    return float(difference.mean()), low, high
