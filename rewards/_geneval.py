"""GenEval's rules: is what was detected what the prompt asked for?

The same rules judge the Shapes world and real images. ``objects`` maps a class to its detections, best
first, each with ``box`` (x0, y0, x1, y1; y down), ``score`` in [0, 1] and ``color``; ``task`` is a row of
GenEval's metadata (Ghosh et al. 2023, arXiv:2310.11513). The strict verdict and the graded score are those
that Flow-GRPO trains on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Detection = Mapping[str, Any]
Objects = Mapping[str, Sequence[Detection]]
Task = Mapping[str, Any]

OVERLAP = 0.1
"""Share of both boxes' sides by which their centres' offset is reduced."""
COMPONENT = 0.5
"""Least part of the offset's direction that makes a relation."""


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """How box ``a`` lies to box ``b``: some of left of, right of, above, below."""
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    width, height = a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]
    x, y = _reduced(dx, OVERLAP * width), _reduced(dy, OVERLAP * height)
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return set()
    norm = math.hypot(dx, dy)
    found = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, component in found.items() if component / norm > COMPONENT}


def lenient(objects: Objects, task: Task) -> bool:
    """GenEval's verdict: at least what was asked for, and none of what is excluded."""
    matched: list[Sequence[Detection] | None] = []
    for clause in task["include"]:
        found = objects.get(clause["class"], ())[: clause["count"]]
        right = len(found) == clause["count"]
        if right and "color" in clause:
            right = sum(d["color"] == clause["color"] for d in found) >= clause["count"]
        if right and "position" in clause:
            right = _placed(found, clause["position"], matched)
        matched.append(found if right else None)
    excluded = any(len(objects.get(c["class"], ())) >= c["count"] for c in task.get("exclude", ()))
    return not excluded and all(group is not None for group in matched)


def strict(objects: Objects, task: Task) -> bool:
    """Exactly as many objects of each class, in colour and place, as were asked for."""
    return _graded(objects, task)[0]


def graded(objects: Objects, task: Task, *, spurious_position_credit: bool = False) -> float:
    """The mean over everything asked for of how far it is there: at most 1, negative where far too many
    objects are found.

    A violated position counts as one 0. The published code adds a 1 after it, for a position that holds
    or not; ``spurious_position_credit`` does so too.
    """
    parts = _graded(objects, task, spurious_position_credit)[1]
    return sum(parts) / len(parts)


def _graded(objects: Objects, task: Task, credit: bool = False) -> tuple[bool, list[float]]:
    matched: list[Sequence[Detection] | None] = []
    parts: list[float] = []
    for clause in task["include"]:
        found, count = objects.get(clause["class"], ()), clause["count"]
        parts.append(1 - abs(count - len(found)) / count)
        right = len(found) == count
        if not right and ("color" in clause or "position" in clause):
            parts.append(0.0)
        if right and "color" in clause:
            colored = sum(d["color"] == clause["color"] for d in found)
            parts.append(1 - abs(count - colored) / count)
            right = colored == count
        if right and "position" in clause:
            known = matched[clause["position"][1]] is not None
            right = _placed(found, clause["position"], matched)
            parts.append(float(right))
            if credit and known and not right:
                parts.append(1.0)
        matched.append(found if right else None)
    return all(group is not None for group in matched), parts


def _placed(
    found: Sequence[Detection], position: tuple[str, int], matched: Sequence[Sequence[Detection] | None]
) -> bool:
    """Whether each of ``found`` is in the relation to each object of the clause that it names."""
    relation, target = position
    group = matched[target]
    return group is not None and all(relation in relations(a["box"], b["box"]) for a in found for b in group)


def _reduced(offset: float, by: float) -> float:
    return math.copysign(max(abs(offset) - by, 0.0), offset)
