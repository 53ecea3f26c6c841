"""Reads a run folder into plain records, for the table and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.engine.tracker import read_metrics
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
