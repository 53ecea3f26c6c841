"""Writes the report of a run, or of several: one HTML page that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.evaluation.likeness import unlike
from posttrain.evaluation.report.charts import curves
from posttrain.evaluation.report.cost import cost_table
from posttrain.evaluation.report.gallery import Column, Versus, changed_prompts, gallery, grids
from posttrain.evaluation.report.html import html
from posttrain.evaluation.report.meaning import meanings
from posttrain.evaluation.report.results import Results, StageResult, alarms_of
from posttrain.evaluation.report.runs import joined, load_runs
from posttrain.evaluation.report.scores import NOTE, score_table, tag_table, with_cost
from posttrain.evaluation.report.settings import environment_lines, evaluation_lines
from posttrain.evaluation.report.verdict import best_stage, gain_of, verdict
from posttrain.evaluation.report.view import Page
from posttrain.support.files import write
from posttrain.weights.run_folders import REPORT


def write_report(*runs: Path, output: Path | None = None) -> Path:
    """Write the report of one run, or of several that it compares; return its path.

    The page needs no network and no other file. ``output`` is by default ``report.html`` in the run's folder,
    and beside the first run's folder where there are several. Raises PosttrainError for a folder that holds
    no run, and DamagedError.
    """
    if not runs:
        raise PosttrainError("a report needs a run")
    target = output or (runs[0] / REPORT if len(runs) == 1 else _parent(runs[0]) / REPORT)
    write(target, html(page_of(load_runs(runs))))
    return target


def _parent(run: Path) -> Path:
    """The folder that ``run`` lies in, named as ``run`` is where its name tells it: relative or absolute."""
    return run.parent if run.name not in ("", "..") else run.absolute().parent


def page_of(runs: Sequence[Results]) -> Page:
    """What the report of ``runs`` shows."""
    results = joined(runs)
    names = results.score_names
    main = [name for name in names if "/" not in name]
    remarks = list(unlike(results.cards))
    columns = _columns(results)
    versus = _versus(results, columns)
    images = gallery(columns, versus, alike=not remarks)
    while_training = [found for stage in results.stages if (found := grids(stage)) is not None]
    first, more = curves(results.stages)
    cost, cost_note = cost_table(results.stages)
    return Page(
        title=results.name,
        lead=verdict(results)
        + ("" if names or not while_training else " The images were drawn in training."),
        remarks=[*remarks, *(line for run in runs for line in run.damage)],
        meanings=list(meanings(results)),
        scores=with_cost(score_table(results, main, "Results"), results.stages),
        details=score_table(results, [name for name in names if name not in main], "Details of the scores"),
        scores_note=NOTE,
        images=images,
        grids=while_training,
        changed=changed_prompts(columns, versus) if versus else None,
        tags=tag_table(results),
        curves=first,
        more_curves=more,
        cost=cost,
        cost_note=cost_note,
        alarms=[line for stage in results.stages for line in _alarms(stage)],
        skipped=[f"{s.name}: {line}" for s in results.stages for line in s.account.get("skipped", [])],
        settings=[(run.name, _settings(run), run.recipe) for run in runs],
    )


def _columns(results: Results) -> list[Column]:
    """The stages that were evaluated, with their images."""
    return [
        Column(s.name, s.scored, s.images, i) for i, s in enumerate(results.stages) if s.scored or s.images
    ]


def _versus(results: Results, columns: Sequence[Column]) -> Versus | None:
    """Samples gain and lose in the best stage, or in the last one where the base model is best or none is.
    None where the two were not evaluated alike."""
    evaluated = [stage for stage in results.stages if stage.scored]
    if not results.score_names or not evaluated:
        return None
    score = results.score_names[0]
    best = best_stage(results, score)
    if best is None or best is results.base_of(best):
        best = evaluated[-1]
    names = [column.name for column in columns]
    pair = results.base_of(best).name, best.name
    if gain_of(results, best, score) is None or not set(pair) <= set(names):
        return None
    higher = best.scores.get(score, {}).get("higher_is_better", True)
    return Versus(names.index(pair[0]), names.index(pair[1]), score, higher)


def _alarms(stage: StageResult) -> list[str]:
    """The alarms of a stage. One that is not finished, or that an alarm stopped, has them in its metrics."""
    if stage.account:
        return stage.account.get("alarms", [])
    return [f"{stage.name}, {line}" for line in alarms_of(stage.metrics)]


def _settings(run: Results) -> list[str]:
    card: dict[str, Any] = next((stage.card for stage in run.stages if stage.card), {})
    return [*evaluation_lines(card), *environment_lines(run.environment)]
