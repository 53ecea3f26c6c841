"""Says which stage of a run is best on a score, and whether the difference is significant."""

from __future__ import annotations

from posttrain.evaluation.intervals import paired_difference
from posttrain.evaluation.report.results import Results, StageResult


def verdict(results: Results) -> str:
    """A sentence that says which stage is best on the first score, and whether that is significant."""
    if not results.score_names:
        return "Nothing has been evaluated."
    score, base = results.score_names[0], results.stages[0]
    best = best_stage(results, score)
    mean = best.scores[score]["mean"]
    if best is base:
        return f"No stage beats the base model on {score} ({mean:.3f})."
    if (gain := difference(base, best, score)) is None:
        return f"{best.name} scores best on {score} ({mean:.3f})."
    change, low, high = gain
    remark = "" if low > 0 or high < 0 else ", which is not significant"
    return (
        f"{best.name} scores best on {score}: {mean:.3f}, {change:+.3f} against the base model "
        f"(95 % interval {low:+.3f} to {high:+.3f}, paired over prompts){remark}."
    )


def best_stage(results: Results, score: str) -> StageResult:
    """The stage with the best mean of ``score``, which at least one stage must have."""
    measured = [s for s in results.stages if score in s.scores]
    sign = 1 if measured[0].scores[score].get("higher_is_better", True) else -1
    return max(measured, key=lambda s: sign * s.scores[score]["mean"])


def difference(base: StageResult, other: StageResult, score: str) -> tuple[float, float, float] | None:
    """The mean gain of ``other`` over ``base`` on the samples that both have, and its 95 % interval.

    None if they share no sample with that score.
    """
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
