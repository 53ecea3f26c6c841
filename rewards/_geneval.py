"""Judges detected objects by GenEval's rules (Ghosh et al. 2023, arXiv:2310.11513).

The rules are the same for Shapes and for real images. ``objects`` maps a class to its detections, best first.
Each detection has ``box`` (x0, y0, x1, y1; y points down), ``score`` in [0, 1] and ``color``. ``task`` is a
row of GenEval's metadata. The strict verdict and the graded score are those that Flow-GRPO trains on
(arXiv:2505.05470).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Detection = Mapping[str, Any]
Objects = Mapping[str, Sequence[Detection]]
Task = Mapping[str, Any]

OVERLAP = 0.1
"""The offset of two boxes' centres is reduced by this fraction of the sum of their sides."""
COMPONENT = 0.5
"""A relation holds if the offset's component in its direction is more than this fraction of the offset."""


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """The relations of box ``a`` to box ``b`` that hold, of "left of", "right of", "above" and "below"."""
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    width, height = a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]
    x, y = _reduced(dx, OVERLAP * width), _reduced(dy, OVERLAP * height)
    if abs(x) < 1e-3 and abs(y) < 1e-3:
        return set()
    norm = math.hypot(dx, dy)
    components = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {name for name, component in components.items() if component / norm > COMPONENT}


def lenient(objects: Objects, task: Task) -> bool:
    """GenEval's verdict: at least the objects asked for are there, and none that is excluded."""
    matched: list[Sequence[Detection] | None] = []
    for clause in task["include"]:
        detections = objects.get(clause["class"], ())[: clause["count"]]
        right = len(detections) == clause["count"]
        if right and "color" in clause:
            right = sum(d["color"] == clause["color"] for d in detections) >= clause["count"]
        if right and "position" in clause:
            right = _in_position(detections, clause["position"], matched)
        matched.append(detections if right else None)
    excluded = any(len(objects.get(c["class"], ())) >= c["count"] for c in task.get("exclude", ()))
    return not excluded and all(group is not None for group in matched)


def strict(objects: Objects, task: Task) -> bool:
    """The strict verdict: each class has exactly the count, colour and position asked for."""
    return _graded(objects, task)[0]


def graded(objects: Objects, task: Task, *, spurious_position_credit: bool = False) -> float:
    """The graded score: the mean credit of the counts, colours and positions asked for.

    A credit is 1 minus the relative error, so the score is at most 1, and negative if there are far too many
    objects. A violated position has the credit 0. Flow-GRPO's published code then adds another credit of 1;
    ``spurious_position_credit`` reproduces that.
    """
    earned = _graded(objects, task, spurious_position_credit)[1]
    return sum(earned) / len(earned)


def _graded(objects: Objects, task: Task, spurious: bool = False) -> tuple[bool, list[float]]:
    """The strict verdict, and the credits."""
    matched: list[Sequence[Detection] | None] = []
    earned: list[float] = []
    for clause in task["include"]:
        detections, count = objects.get(clause["class"], ()), clause["count"]
        earned.append(1 - abs(count - len(detections)) / count)
        right = len(detections) == count
        if not right and ("color" in clause or "position" in clause):
            earned.append(0.0)
        if right and "color" in clause:
            colored = sum(d["color"] == clause["color"] for d in detections)
            earned.append(1 - abs(count - colored) / count)
            right = colored == count
        if right and "position" in clause:
            target_matched = matched[clause["position"][1]] is not None
            right = _in_position(detections, clause["position"], matched)
            earned.append(float(right))
            if spurious and target_matched and not right:
                earned.append(1.0)
        matched.append(detections if right else None)
    return all(group is not None for group in matched), earned


def _in_position(
    detections: Sequence[Detection], position: tuple[str, int], matched: Sequence[Sequence[Detection] | None]
) -> bool:
    """Whether every detection is in the relation of ``position`` to every object of the clause it names."""
    relation, target = position
    group = matched[target]
    if group is None:
        return False
    return all(relation in relations(a["box"], b["box"]) for a in detections for b in group)


def _reduced(offset: float, by: float) -> float:
    return math.copysign(max(abs(offset) - by, 0.0), offset)
