"""How do GenEval's verdicts on what was found in images become a reward's scores?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from posttrain.reward import Scores
from posttrain.rewards._geneval import Objects, Task, graded, lenient, strict

Verdict = Literal["graded", "lenient", "strict"]
"""``graded``: how far each thing asked for is there, negative where there are far too many;
``strict``: exactly what was asked for; ``lenient``: GenEval's own verdict."""
JUDGES = {"graded": graded, "lenient": lenient, "strict": strict}


def scores(found: Sequence[Objects], tasks: Sequence[Task], verdict: Verdict) -> Scores:
    """``verdict`` on what was ``found`` in each image, the other two as details."""
    values = {
        name: torch.tensor([float(judge(objects, task)) for objects, task in zip(found, tasks, strict=True)])
        for name, judge in JUDGES.items()
    }
    return Scores(values.pop(verdict), values)


def untold(row: Mapping[str, Any]) -> str | None:
    """Why a prompt cannot be judged by GenEval's rules; None if it can."""
    if "include" not in row:
        return "it has no GenEval metadata ('include') to judge by"
    include, exclude = row["include"], row.get("exclude", [])
    listed = isinstance(include, Sequence) and isinstance(exclude, Sequence)
    if not listed or not include or not all(map(_is_clause, (*include, *exclude))):
        return "its 'include' or 'exclude' is no list of objects with a 'class' and a 'count' from 1"
    for i, clause in enumerate(include):
        position = clause.get("position")
        if position is not None and not _is_position(position, i):
            return f"the position {position!r} is no relation and the number of an object before it"
    return None


def _is_clause(clause: Any) -> bool:
    return (
        isinstance(clause, Mapping)
        and isinstance(clause.get("class"), str)
        and isinstance(clause.get("count"), int)
        and clause["count"] >= 1
    )


def _is_position(position: Any, index: int) -> bool:
    match position:
        case ["left of" | "right of" | "above" | "below", int(target)]:
            return 0 <= target < index
    return False
