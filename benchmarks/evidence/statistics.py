"""Differences between arms, with intervals that count the chance of training seeds and of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Difference:
    """A mean difference, its standard error, its 95 % interval, and how it came about. What one seed cannot
    tell is NaN."""

    mean: float
    error: float
    low: float
    high: float
    p: float
    """Two-sided, against no difference, of this comparison alone: see :func:`holm`."""
    of_seeds: float
    """Half of the 95 % interval for other training seeds and noise alone, with the same prompts."""
    agree: str
    """How many training seeds have a mean on the side of the whole mean: "4 of 5"."""

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def difference(a: ArrayLike, b: ArrayLike, labels: Sequence[str]) -> Difference:
    """The mean of ``b - a``, both (seeds, samples), paired by training seed and sample.

    Samples with equal ``labels`` (samples,) belong together: those of a prompt. Seeds and labels are crossed
    random effects, so the interval is for other training seeds as well as for other prompts. The variance of
    the mean is (M_seeds + M_labels - M_rest) / (seeds x labels), where the M are the mean squares of the
    two-way analysis of variance, and the t distribution has Satterthwaite's degrees of freedom (Searle,
    Casella & McCulloch 1992, chapter 4). A bootstrap of both would count what is neither of seeds nor of
    prompts three times, and would be too narrow where few seeds differ. Where the prompts are all that there
    are, :attr:`Difference.of_seeds` is the interval, and the other one too wide.

    Raises ValueError for fewer than two seeds or labels.
    """
    change: NDArray[np.float64] = np.asarray(b, float) - np.asarray(a, float)
    if change.ndim != 2 or change.shape[1] != len(labels):
        raise ValueError(f"{change.shape} are not (seeds, samples) of {len(labels)} samples")
    groups = np.unique(np.asarray(labels), return_inverse=True)[1]
    counts, sums = np.bincount(groups), np.stack([np.bincount(groups, row) for row in change])
    mean, (s, n) = float(change.mean()), sums.shape
    if s < 2 or n < 2:
        raise ValueError(f"{s} seeds and {n} labels: an interval needs two of each")
    z = (sums - counts * mean) / counts.mean()  # labels differ in size: the mean is a ratio, here linearised
    rows, columns = z.mean(1), z.mean(0)
    of_seeds, of_labels = n * (rows**2).sum() / (s - 1), s * (columns**2).sum() / (n - 1)
    rest = ((z - rows[:, None] - columns) ** 2).sum() / ((s - 1) * (n - 1))
    total = rest + max(of_seeds - rest, 0) + max(of_labels - rest, 0)
    error = float(np.sqrt(total / (s * n)))
    of_seeds_alone = Student(s - 1).quantile(0.95) * float(rows.std(ddof=1)) / s**0.5
    agree = f"{int((np.sign(change.mean(1)) == np.sign(mean)).sum())} of {s}"
    if error < 1e-12:
        return Difference(mean, 0.0, mean, mean, float(abs(mean) < 1e-12), 0.0, agree)
    uncertain = of_seeds**2 / (s - 1) + of_labels**2 / (n - 1) + rest**2 / ((s - 1) * (n - 1))
    t = Student(max(1.0, total**2 / uncertain))
    half = t.quantile(0.95) * error
    return Difference(mean, error, mean - half, mean + half, t.p(mean / error), of_seeds_alone, agree)


class Student:
    """The t distribution with ``df`` >= 1 degrees of freedom: t = sqrt(df) tan(angle), whose density is
    proportional to cos(angle)^(df - 1)."""

    def __init__(self, df: float) -> None:
        self.df, self._angles = df, np.linspace(0, np.pi / 2, 20_001)
        density = np.cos(self._angles).clip(0) ** (df - 1)
        below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
        self._inside = below / below[-1]

    def quantile(self, inside: float) -> float:
        """The t for which ``inside`` of the distribution lies between -t and t."""
        return float(np.sqrt(self.df) * np.tan(np.interp(inside, self._inside, self._angles)))

    def p(self, t: float) -> float:
        """How much of the distribution is farther from 0 than ``t``."""
        return float(1 - np.interp(np.arctan(abs(t) / np.sqrt(self.df)), self._angles, self._inside))


def holm(ps: Sequence[float]) -> list[float]:
    """``ps`` adjusted for being as many as they are (Holm 1979): all below 0.05 hold together with 95 %."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps, kind="stable")):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted
