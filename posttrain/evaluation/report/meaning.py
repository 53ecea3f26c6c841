"""Says what scores mean: what is measured, between which bounds, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.evaluation.report.results import Results
from posttrain.scoring.catalogue import every_reward


def meanings(results: Results) -> Iterator[tuple[str, str]]:
    """Name and meaning of each score that is not a detail of another one."""
    for name in results.score_names:
        if "/" not in name:
            stage = next(stage for stage in results.stages if name in stage.scores)
            scorer = stage.card.get("scorers", {}).get(name, {})
            yield name, meaning(scorer, higher=stage.scores[name].get("higher_is_better", True))


def meaning(scorer: Mapping[str, Any], *, higher: bool) -> str:
    """What the scores of ``scorer`` mean, an entry of a result card's ``scorers``.

    Of a reward that this install lacks, only the direction is told.
    """
    direction = "higher is better" if higher else "lower is better"
    kind = every_reward().get(str(scorer.get("type")))
    if kind is None:
        return f"{direction.capitalize()}."
    # a card leaves out what changes no score, such as a server's address, and has hashes for weights
    settings = {name: value for name, value in scorer.items() if name in kind.model_fields}
    reward = kind.model_construct(**settings)
    low, high = getattr(reward, "range", (-math.inf, math.inf))  # a plug-in's may lack it
    about = reward.about() or f"Its class, {kind.__name__}, does not say what it measures."
    return f"{about} {bounds(low, high)}; {direction}."


def bounds(low: float, high: float) -> str:
    """A range in words, such as ``From 0 to 1``."""
    if math.isfinite(low) and math.isfinite(high):
        return f"From {low:.3g} to {high:.3g}"
    if math.isfinite(low):
        return f"At least {low:.3g}"
    return f"At most {high:.3g}" if math.isfinite(high) else "Without bounds"
