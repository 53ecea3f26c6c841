"""Differences between arms over seeds and prompts, with intervals that count the chance of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Difference:
    """A mean difference, its standard error, and its 95 % interval."""

    mean: float
    error: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.low <= 0 <= self.high


def difference(
    a: ArrayLike, b: ArrayLike, prompts: Sequence[str], *, resamples: int = 4000, seed: int = 0
) -> Difference:
    """The mean of ``b - a``, both (seeds, samples), paired by training seed and sample.

    Samples with equal ``prompts`` (samples,) belong together. The bootstrap draws seeds and prompts
    independently, with replacement (the two-way, or pigeonhole, bootstrap: Owen 2007, section 4), so its
    interval is for other training seeds as well as for other prompts. It is wide rather than narrow.
    """
    change: NDArray[np.float64] = np.asarray(b, float) - np.asarray(a, float)
    if change.ndim != 2 or change.shape[1] != len(prompts):
        raise ValueError(f"{change.shape} are not (seeds, samples) of {len(prompts)} samples")
    labels = np.unique(np.asarray(prompts), return_inverse=True)[1]
    sums = np.stack([np.bincount(labels, row) for row in change])
    counts = np.bincount(labels)
    rng, (seeds, groups) = np.random.default_rng(seed), sums.shape
    means = []
    for _ in range(resamples):
        s, g = rng.integers(seeds, size=seeds), rng.integers(groups, size=groups)
        means.append(sums[s][:, g].sum() / (seeds * counts[g].sum()))
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(change.mean()), float(np.std(means)), float(low), float(high))
