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
    return None if "include" in row else "it has no GenEval metadata ('include') to judge by"
