"""Says which stage of a run is best on a score, and whether the difference is significant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from posttrain.evaluation.intervals import paired_difference
from posttrain.evaluation.likeness import unlike
from posttrain.evaluation.report.results import Results, StageResult
from posttrain.evaluation.report.view import gain_texts, number


@dataclass(frozen=True)
class Gain:
    """The paired difference from the base model, and its 95 % interval."""

    change: float
    low: float
    high: float
    higher_is_better: bool

    @property
    def known(self) -> bool:
        """Whether there is an interval: one sample has none."""
        return math.isfinite(self.high)

    @property
    def kind(self) -> Literal["better", "worse", "same"]:
        """What the difference says; ``same`` is one that is not significant."""
        if self.low <= 0 <= self.high:
            return "same"
        return "better" if (self.change > 0) is self.higher_is_better else "worse"


def verdict(results: Results) -> str:
    """A sentence that says which stage is best on the first score, and whether that is significant."""
    if not results.score_names:
        return "Nothing has been evaluated."
    score = results.score_names[0]
    if (best := best_stage(results, score)) is None:
        return f"Not all models were evaluated alike, so none is best on {score}."
    mean, measured = number(best.scores[score]["mean"]), [s for s in results.stages if score in s.scores]
    if all(stage is results.base_of(stage) for stage in measured):
        return f"Only the base model has been evaluated on {score} ({mean})."
    if all(best is results.base_of(stage) for stage in measured):
        return f"No stage beats the base model on {score} ({mean})."
    if (gain := gain_of(results, best, score)) is None:
        return f"{best.name} scores best on {score} ({mean})."
    change, low, high = gain_texts(gain.change, gain.low, gain.high)
    told = f"95 % interval {low} to {high}, paired over prompts" if gain.known else "of one sample"
    remark = ", which is not significant" if gain.kind == "same" else ""
    return f"{best.name} scores best on {score}: {mean}, {change} against the base model ({told}){remark}."


def gain_of(results: Results, stage: StageResult, score: str) -> Gain | None:
    """The gain of ``stage`` over its base model.

    None for the base model itself, and where the two have no sample in common or were not evaluated alike.
    """
    base = results.base_of(stage)
    if stage is base or score not in stage.scores:
        return None
    if (found := difference(base, stage, score)) is None:
        return None
    return Gain(*found, stage.scores[score].get("higher_is_better", True))


def best_stage(results: Results, score: str) -> StageResult | None:
    """The stage with the best mean of ``score``, which at least one stage must have.

    None where not all that have it were evaluated alike: a mean on easier prompts is not better.
    """
    measured = [s for s in results.stages if score in s.scores]
    if any(unlike({stage.name: stage.card for stage in measured})):
        return None
    sign = 1 if measured[0].scores[score].get("higher_is_better", True) else -1
    return max(measured, key=lambda s: sign * s.scores[score]["mean"])


def difference(base: StageResult, other: StageResult, score: str) -> tuple[float, float, float] | None:
    """The mean gain of ``other`` over ``base`` on the samples that both have, and its 95 % interval.

    None if they share no sample with that score, or were not evaluated alike.
    """
    if any(unlike({base.name: base.card, other.name: other.card})):
        return None
    before = {(r["prompt"], r["index"]): r["scores"] for r in base.samples}
    pairs = [
        (before[key][score], r["scores"][score], r["prompt"])
        for r in other.samples
        if (key := (r["prompt"], r["index"])) in before and score in before[key] and score in r["scores"]
    ]
    if not pairs:
        return None
    a, b, prompts = zip(*pairs, strict=True)
    return paired_difference(a, b, groups=prompts)
