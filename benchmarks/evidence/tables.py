"""Makes the Markdown tables of the arms from their records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.records import Record, Records, between, forwards
from benchmarks.evidence.statistics import Difference, holm
from posttrain.support.wording import short

VERDICTS = ("shapes", "shapes/lenient", "shapes/strict")
BANDS = ((0.75, 1.01), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))
"""Of sigma: from the first number to below the second."""
COMPARED = "graded, difference [95 %] | standard error | seeds alone, 95 % | seeds that agree | p"
Pairs = Sequence[tuple[str, str]]


def present(records: Records) -> list[str]:
    """The base and the arms that have records, in their order."""
    return [name for name in ("base", *ARMS) if name in records]


def scores_table(records: Records, names: Sequence[str], key: str, scores: Sequence[str]) -> Iterator[str]:
    """A row for each name: its mean scores in the evaluation ``key`` over all seeds, and its cost."""
    heads = [{"shapes": "graded"}.get(score, score.rpartition("/")[2]) for score in scores]
    yield from _head("arm", "seeds", *heads, "forward-equivalents")
    for name in names:
        of = [record["evaluations"][key] for record in records[name]]
        means = [f"{fmean(fmean(e[score]) for e in of):.3f}" for score in scores]
        cost = forwards(records, name)
        yield _row(f"`{name}`", len(of), *means, short(cost) if cost else "")


def differences_table(records: Records, pairs: Pairs, key: str, score: str = "shapes") -> Iterator[str]:
    """A row for each pair of arm and rival that have a seed in common: the difference, and p adjusted by
    Holm's method for all rows that have one."""
    found = [
        (arm, rival, change)
        for arm, rival in pairs
        if (change := between(records, arm, rival, _score(key, score), _prompts)) is not None
    ]
    yield from _head("arm", "against", *COMPARED.split(" | "))
    adjusted = iter(holm([change.p for *_, change in found if not math.isnan(change.p)]))
    for arm, rival, change in found:
        told = ["", ""] if math.isnan(change.p) else [f"{change.error:.4f}", _alone(change)]
        p = "" if math.isnan(change.p) else _p(next(adjusted))
        yield _row(f"`{arm}`", f"`{rival}`", change, *told, change.agree, p)


def kinds_table(records: Records, names: Sequence[str], key: str) -> Iterator[str]:
    """The graded, lenient and strict scores of each arm by kind of task."""
    found = {name: [_by_kind(records[name], key, score) for score in VERDICTS] for name in names}
    kinds = sorted({kind for of_arm in found.values() for kind in of_arm[0]})
    yield from _head("arm", *kinds)
    for name, verdicts in found.items():
        yield _row(f"`{name}`", *(" / ".join(f"{fmean(of[kind]):.3f}" for of in verdicts) for kind in kinds))


def _by_kind(records: Sequence[Record], key: str, score: str) -> dict[str, list[float]]:
    """Kind of task -> the scores of all its samples in the evaluation ``key``."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        values = record["evaluations"][key][score]
        for tag, value in zip(record["tags"][: len(values)], values, strict=True):
            found[tag].append(value)
    return found


def bias_table(records: Records, what: str, *, excess: bool = False) -> Iterator[str]:
    """The squared error of the predicted image in bands of sigma: of the base, and of each arm its change.

    ``what`` is ``data`` or a rollout; ``excess`` subtracts the error before the rollout's steps.
    """
    names = present(records)
    yield from _head("arm", *(f"sigma {low:g} to {min(high, 1):g}" for low, high in BANDS))
    for name in names:
        cells = []
        for band in BANDS:
            values = _bias(what, excess, band)
            if not values(records[name][0]):  # a rollout of several steps ends below the highest sigmas
                cells.append("")
            elif name == "base":
                cells.append(f"{fmean(fmean(values(record)) for record in records[name]):.4f}")
            else:
                cells.append(_told(between(records, name, "base", values, _captions)))
        yield _row(f"`{name}`", *cells)


def _bias(what: str, excess: bool, band: tuple[float, float]) -> Callable[[Record], list[float]]:
    """A record's error of each image, as the mean over the sigmas of ``band``; empty if it has none."""

    def values(record: Record) -> list[float]:
        bias = record["exposure_bias"]
        ends = range(len(bias["sigmas"])) if what == "data" else bias[what]["ends"]
        rows = bias["data"] if what == "data" else bias[what]["model"]
        before = bias[what]["steps"] if excess else 0
        found: list[list[float]] = []
        for end, row in zip(ends, rows, strict=True):
            if band[0] <= bias["sigmas"][end] < band[1]:
                start = bias["data"][end - before] if excess else [0.0] * len(row)
                found.append([value - first for value, first in zip(row, start, strict=True)])
        return [fmean(image) for image in zip(*found, strict=True)]

    return values


def _score(key: str, score: str) -> Callable[[Record], list[float]]:
    return lambda record: record["evaluations"][key][score]


def _prompts(record: Record) -> list[str]:
    return record["prompts"]


def _captions(record: Record) -> list[str]:
    return record["exposure_bias"]["captions"]


def _told(change: Difference | None) -> str:
    if change is None:
        return ""
    return f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"


def _alone(change: Difference) -> str:
    return f"+- {change.of_seeds:.3f}"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield _row(*["---"] * len(cells))


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"
