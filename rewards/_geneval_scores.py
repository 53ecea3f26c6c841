"""Turns GenEval's verdicts into a reward's scores, and checks prompts' metadata."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch

from posttrain.reward import Scores
from posttrain.rewards._geneval import Objects, Task, graded, lenient, strict
from posttrain.support.spelling import meant

Verdict = Literal["graded", "lenient", "strict"]
"""``graded``: the mean credit of the counts, colours and positions asked for, negative if there are far too
many objects; ``strict``: 1 if exactly what was asked for is there; ``lenient``: GenEval's own verdict."""
JUDGES = {"graded": graded, "lenient": lenient, "strict": strict}


def scores(images: Sequence[Objects], tasks: Sequence[Task], verdict: Verdict) -> Scores:
    """Judge the objects detected in each of ``images`` by ``verdict``; the other two verdicts are details."""
    values = {
        name: torch.tensor([float(judge(objects, task)) for objects, task in zip(images, tasks, strict=True)])
        for name, judge in JUDGES.items()
    }
    return Scores(values.pop(verdict), values)


def metadata_problem(row: Mapping[str, Any]) -> str | None:
    """Say why the metadata in ``row`` is not GenEval's; None if it is."""
    if "include" not in row:
        return "it has no GenEval metadata ('include') to judge by"
    include, exclude = row["include"], row.get("exclude", [])
    both_lists = isinstance(include, Sequence) and isinstance(exclude, Sequence)
    if not both_lists or not include or not all(map(_is_clause, (*include, *exclude))):
        return "its 'include' or 'exclude' is no list of objects with a 'class' and a 'count' from 1"
    for i, clause in enumerate(include):
        if "position" in clause and not _is_position(position := clause["position"], i):
            return f"the position {position!r} is no relation and the number of an object before it"
    return None


def unknown(
    row: Mapping[str, Any], detector: str, classes: Collection[str], colors: Collection[str]
) -> str | None:
    """Say which class or colour of the metadata in ``row`` the ``detector`` cannot find; None if it can."""
    for clause in (*row["include"], *row.get("exclude", ())):
        if (kind := clause["class"]) not in classes:
            return f"{detector} knows no {kind!r}{meant(kind, classes)}"
        if "color" in clause and (color := clause["color"]) not in colors:
            return f"{color!r} is none of the colours {', '.join(colors)}"
    return None


def _is_clause(clause: Any) -> bool:
    """Whether ``clause`` asks for a class and a count."""
    return (
        isinstance(clause, Mapping)
        and isinstance(clause.get("class"), str)
        and type(clause.get("count")) is int
        and clause["count"] >= 1
    )


def _is_position(position: Any, index: int) -> bool:
    """Whether ``position`` is a relation to a clause before number ``index``."""
    match position:
        case ["left of" | "right of" | "above" | "below", int(target)]:
            return type(target) is int and 0 <= target < index
    return False
