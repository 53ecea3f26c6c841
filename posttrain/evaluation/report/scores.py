"""Makes the tables of scores: means, intervals, and differences from the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.evaluation.report.cost import origin, training_cost
from posttrain.evaluation.report.curves import interval
from posttrain.evaluation.report.results import Results, StageResult
from posttrain.evaluation.report.verdict import Gain, best_stage, gain_of
from posttrain.evaluation.report.view import Cell, Row, Table, gain_texts, interval_texts, number

NOTE = (
    "Each cell has the mean, its 95 % bootstrap interval over prompts, and the difference from the base "
    "model on the same prompts and noise. The drawing shows the difference and its interval beside a line "
    "at 0; only a difference whose interval leaves out 0 has a colour. The best mean is bold."
)
WORDS = {"better": "better", "worse": "worse", "same": "not significant"}


def score_table(results: Results, names: Sequence[str], title: str) -> Table | None:
    """A table with a row for each stage and a column for each score. None without scores."""
    if not names:
        return None
    columns = [_column(results, name) for name in names]
    rows = [
        Row(stage.name, [column[i] for column in columns], origin(stage), i)
        for i, stage in enumerate(results.stages)
    ]
    return Table(title, "stage", [_heading(results, name) for name in names], rows)


def with_cost(table: Table | None, stages: Sequence[StageResult]) -> Table | None:
    """The table with a last column: what the training of each stage cost."""
    if table is None:
        return None
    pairs = zip(table.rows, stages, strict=True)
    rows = [replace(row, cells=[*row.cells, training_cost(stage).cell()]) for row, stage in pairs]
    return replace(table, columns=[*table.columns, "cost of training"], rows=rows)


def _heading(results: Results, name: str) -> str:
    score = next(stage.scores[name] for stage in results.stages if name in stage.scores)
    return name if score.get("higher_is_better", True) else f"{name} (lower is better)"


def _column(results: Results, name: str) -> list[Cell]:
    """The cells of one score, of which at least one stage has one."""
    best = best_stage(results, name)
    gains = [gain_of(results, stage, name) for stage in results.stages]
    return [
        score_cell(stage.scores.get(name), gain, gains, best=stage is best)
        for stage, gain in zip(results.stages, gains, strict=True)
    ]


def score_cell(
    score: Mapping[str, Any] | None, gain: Gain | None, of_all: Sequence[Gain | None], *, best: bool
) -> Cell:
    """The cell of ``score``; the drawings of all gains ``of_all`` in its column have one scale."""
    if score is None:
        return Cell()
    bounds = [" – ".join(ends)] if (ends := interval_texts(score)) else []
    if gain is None:
        return Cell(number(score["mean"]), bounds, best=best)
    drawing = None
    if gain.known:
        known = [other for other in of_all if other is not None and other.known]
        span = min(other.low for other in known), max(other.high for other in known)
        drawing = interval(gain.change, gain.low, gain.high, span, gain.kind)
    return Cell(number(score["mean"]), bounds, change_text(gain), gain.kind, best, drawing)


def change_text(gain: Gain) -> str:
    """A difference in words, with its interval: ``+0.050 (+0.010 to +0.090) better``."""
    change, low, high = gain_texts(gain.change, gain.low, gain.high)
    return f"{change} ({f'{low} to {high}' if gain.known else 'of one sample'}) {WORDS[gain.kind]}"


def tag_table(results: Results) -> Table | None:
    """The first score by tag: a row for each tag, and a column for each stage. None without tags."""
    tags = list(dict.fromkeys(tag for stage in results.stages for tag in stage.card.get("tags", {})))
    if not tags or not results.score_names:
        return None
    score = results.score_names[0]
    names = [stage.name for stage in results.stages]
    rows = []
    for tag in tags:
        only = _of_tag(results, tag)
        measured = any(score in stage.scores for stage in only.stages)
        rows.append(Row(tag, _column(only, score) if measured else [Cell()] * len(names)))
    return Table(f"{score} by tag", "tag", names, rows)


def _of_tag(results: Results, tag: str) -> Results:
    """The results on the samples with one tag alone."""
    found = {
        id(stage): replace(
            stage,
            card={**stage.card, "scores": stage.card.get("tags", {}).get(tag, {})},
            samples=[row for row in stage.samples if row.get("tag") == tag],
        )
        for stage in (*results.stages, *results.bases.values())
    }
    stages = [found[id(stage)] for stage in results.stages]
    return replace(
        results, stages=stages, bases={name: found[id(base)] for name, base in results.bases.items()}
    )
