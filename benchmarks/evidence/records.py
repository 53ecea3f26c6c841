"""Reads the records of the evidence, and compares them in pairs of equal seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.evidence.arms import ARMS
from benchmarks.evidence.identity import differing
from benchmarks.evidence.statistics import Difference, difference
from posttrain.errors import PosttrainError
from posttrain.evaluation.intervals import paired_difference
from posttrain.support.records import read_object

Record = Mapping[str, Any]
Records = Mapping[str, Sequence[Record]]
"""An arm's or a chain's records in the order of their seeds."""
DEARER = 0.02
"""How far the costs of arms that are to be equally dear may differ."""


def read(folder: Path) -> Records:
    """The records of ``folder``, by arm.

    Raises PosttrainError if they cannot be compared: another base model or judge, one arm's seeds trained or
    measured in different ways, or arms of equal cost whose runs counted otherwise.
    """
    found: dict[str, list[Record]] = defaultdict(list)
    for file in sorted(folder.glob("*.json")):
        record = read_object(file, "arm", "seed", "identity", "evaluations")
        found[record["arm"]].append(record)
    everyone = [record for of_arm in found.values() for record in of_arm]
    _refuse_mixed(folder, everyone, ("base", "judge"))
    for of_arm in found.values():
        _refuse_mixed(folder, of_arm, ("base", "judge", "measures", "recipes"))
    for are_arms in (True, False):  # chains are measured in another way
        group = [arm for arm in found if (arm in ARMS or arm == "base") is are_arms]
        _refuse_mixed(folder, [record for arm in group for record in found[arm]], ("measures",))
    records = {arm: sorted(of_arm, key=lambda r: r["seed"]) for arm, of_arm in found.items()}
    _refuse_unequal_costs(records)
    return records


def _refuse_mixed(folder: Path, records: Sequence[Record], entries: Sequence[str]) -> None:
    for record in records[1:]:
        if other := set(differing(records[0]["identity"], record["identity"])) & set(entries):
            names = " and ".join(f"{r['arm']}-{r['seed']}" for r in (records[0], record))
            raise PosttrainError(f"{folder}: {names} were made by other {', '.join(sorted(other))}")


def _refuse_unequal_costs(records: Records) -> None:
    for name, arm in ARMS.items():
        if arm.as_dear_as in records and name in records:
            one, other = (forwards(records, a) for a in (name, arm.as_dear_as))
            if abs(one / other - 1) > DEARER:
                raise PosttrainError(f"{name} cost {one:g} forward-equivalents, {arm.as_dear_as} {other:g}")


def forwards(records: Records, arm: str) -> float:
    """The forward-equivalents that the runs of ``arm`` counted, on average; 0 for the base."""
    return fmean(r["cost"].get("forward_equivalents", 0) for r in records[arm])


def between(
    records: Records,
    arm: str,
    against: str,
    values: Callable[[Record], Sequence[float]],
    labels: Callable[[Record], Sequence[str]],
) -> Difference | None:
    """``arm`` minus ``against`` in their ``values``, on the seeds that both have; None if there is none. That
    of one seed has the bootstrap's interval for other prompts, and no error or p.

    Fewer values than ``labels`` are those of the first. Raises PosttrainError if the two have other
    ``labels``: other prompts, or other images.
    """
    theirs = {r["seed"]: r for r in records.get(against, ())}
    pairs = [(theirs[r["seed"]], r) for r in records.get(arm, ()) if r["seed"] in theirs]
    if not pairs:
        return None
    same = labels(pairs[0][0])
    if any(labels(record) != same for pair in pairs for record in pair):
        raise PosttrainError(f"{arm} and {against} were measured on other prompts or images")
    a, b = ([values(record) for record in side] for side in zip(*pairs, strict=True))
    labelled = same[: len(a[0])]
    if len(pairs) == 1:
        mean, low, high = paired_difference(a[0], b[0], groups=labelled)
        return Difference(mean, math.nan, low, high, math.nan, math.nan, "1 of 1")
    return difference(a, b, labelled)
