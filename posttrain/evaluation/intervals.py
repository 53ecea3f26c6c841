"""How sure is a mean, and a difference of two means?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 2_000_000
"""Resampled values held at once."""


def bootstrap_interval(
    values: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean (Efron & Tibshirani 1993, chapter 13).

    With ``groups``, one label a value, whole groups are drawn: the images of one prompt are not
    independent (of a single group, values are drawn). The mean stays that over all values. Raises
    ValueError where there is no value.
    """
    flat = np.asarray(values, float)
    if flat.ndim != 1 or not len(flat):
        raise ValueError(f"a bootstrap needs a list of values, not an array of shape {flat.shape}")
    labels = np.arange(len(flat)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if not labels.any():
        labels = np.arange(len(flat))  # drawing the one group again and again would have no spread
    sums, counts = np.bincount(labels, flat), np.bincount(labels)
    rng, means = np.random.default_rng(seed), []
    step = max(1, CHUNK // len(sums))
    for start in range(0, resamples, step):
        drawn = rng.integers(len(sums), size=(min(step, resamples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, groups: ArrayLike | None = None, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of ``b - a`` over pairs, and its bootstrap interval. Raises ValueError for unequal lengths."""
    first, second = np.asarray(a, float), np.asarray(b, float)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths, not {first.shape} and {second.shape}")
    difference: NDArray[np.float64] = second - first
    low, high = bootstrap_interval(difference, groups=groups, level=level)
    return float(difference.mean()), low, high
