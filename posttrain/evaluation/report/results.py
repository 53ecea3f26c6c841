"""Reads a run folder into plain records, for the table and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.engine.tracker import read_metrics
from posttrain.evaluation.intervals import paired_difference
from posttrain.support.wording import short


@dataclass
class StageResult:
    """The results of one stage, or of the base model. What a stage has not written yet is empty."""

    name: str
    algorithm: str | None
    parent: str | None
    account: dict[str, Any] = field(default_factory=dict)
    """The content of ``stage.json``: steps, forward_equivalents, images_per_second, and so on."""
    card: dict[str, Any] = field(default_factory=dict)
    """The content of ``evaluation/eval.json``."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The rows of ``evaluation/records.jsonl``."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """The rows of ``metrics.jsonl``."""
    images: dict[str, Path] = field(default_factory=dict)
    """Prompt -> its image in the evaluation's grid."""

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Name of a score -> its mean, low, high, count and higher_is_better."""
        return self.card.get("scores", {})


@dataclass
class Results:
    """The results of a run. The first stage is the base model."""

    name: str
    stages: list[StageResult]
    recipe: str
    environment: dict[str, Any]

    @property
    def score_names(self) -> list[str]:
        """The names of the scores, in the order in which they were measured."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage.scores))


def load_results(run: Path) -> Results:
    """Read a run folder, finished or not."""
    description = _json(run / "run.json")
    return Results(
        description.get("name", run.name),
        [_stage(run / row["name"], row) for row in description.get("stages", [])],
        (run / "recipe.yaml").read_text("utf-8") if (run / "recipe.yaml").is_file() else "",
        _json(run / "environment.json"),
    )


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


def cost_texts(stage: StageResult) -> list[str]:
    """What a stage cost: forward-equivalents, images per second, peak memory, steps, trained parameters."""
    account = stage.account
    rate = account.get("images_per_second")
    return [
        short(account.get("forward_equivalents")),
        "–" if rate is None else f"{rate:.1f}",
        short(account.get("peak_memory_bytes"), "B"),
        short(account.get("steps")),
        short(account.get("trainable_parameters")),
    ]


def _stage(folder: Path, row: dict[str, Any]) -> StageResult:
    evaluation = folder / "evaluation"
    summary = _json(evaluation / "eval.json")
    files = sorted((evaluation / "grid").glob("*.png"))
    records = evaluation / "records.jsonl"
    return StageResult(
        row["name"],
        row["algorithm"],
        row["parent"],
        _json(folder / "stage.json"),
        summary,
        [json.loads(line) for line in records.read_text().splitlines()] if records.is_file() else [],
        read_metrics(folder / "metrics.jsonl"),
        dict(zip(summary.get("grid_prompts", []), files, strict=False)),
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
