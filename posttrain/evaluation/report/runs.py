"""Joins the results of several runs, so that they are compared like the stages of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from posttrain.errors import PosttrainError
from posttrain.evaluation.card import differing
from posttrain.evaluation.likeness import FREE
from posttrain.evaluation.names import distinct_names
from posttrain.evaluation.report.results import Results, StageResult, load_results
from posttrain.recipe.schema import BASE
from posttrain.weights.run_folders import run_problem


def load_runs(folders: Sequence[Path]) -> list[Results]:
    """The results of each run; several runs are named by their folders.

    Raises PosttrainError for a folder that holds no run, or that is given twice, and DamagedError.
    """
    for folder in folders:
        if (problem := run_problem(folder)) is not None:
            raise PosttrainError(problem)
    runs = [load_results(folder) for folder in folders]
    if len(runs) == 1:
        return runs
    return [replace(run, name=name) for run, name in zip(runs, distinct_names(folders), strict=True)]


def joined(runs: Sequence[Results]) -> Results:
    """The stages of all ``runs``, named ``RUN/STAGE``. A single run stays as it is.

    Of base models that were measured alike the first one is kept, and is named ``base`` if it is the only
    one. The gain of each stage is measured against the base model of its own run.
    """
    if len(runs) == 1:
        return runs[0]
    named = [[_named(stage, run.name) for stage in run.stages] for run in runs if run.stages]
    measured = [own[0] for own in named if own[0].card] or [own[0] for own in named[:1]]
    kept = [base for i, base in enumerate(measured) if not any(_alike(base, b) for b in measured[:i])]
    stages: list[StageResult] = []
    bases: dict[str, StageResult] = {}
    for base, *others in named:
        # a base model that was not evaluated has nothing to show
        same = next((b for b in kept if _alike(b, base)), kept[0])
        stages += [*([base] if base is same else []), *others]
        bases |= {stage.name: same for stage in (same, *others)}
    if len(kept) == 1:
        stages.remove(kept[0])
        stages.insert(0, replace(kept[0], name=BASE))
        bases = dict.fromkeys(bases, stages[0])
    return Results(" · ".join(run.name for run in runs), stages, "", {}, bases)


def _named(stage: StageResult, run: str) -> StageResult:
    """``stage`` with the name of its ``run`` before its own, and before its alarms, which begin with it."""
    account = stage.account
    if alarms := account.get("alarms"):
        account = {**account, "alarms": [f"{run}/{line}" for line in alarms]}
    return replace(stage, name=f"{run}/{stage.name}", account=account)


def _alike(one: StageResult, other: StageResult) -> bool:
    """Whether two base models are the same, and were measured in the same way."""
    return all(line.startswith((FREE, "shown")) for line in differing(one.card, other.card))
