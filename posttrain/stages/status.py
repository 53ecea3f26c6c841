"""Reads from a run's folder how far the run is, while it runs or later. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML, YAMLError

from posttrain.engine.checkpoint_folder import saved, step_of
from posttrain.engine.tracker import METRICS, read_metrics
from posttrain.errors import DamagedError, PosttrainError
from posttrain.evaluation.parts import CLAIM, PARTS, read_what_is_whole
from posttrain.evaluation.report.results import alarms_of, damage_of
from posttrain.recipe.schema import BASE
from posttrain.stages.stage_state import RECIPE, SUMMARY
from posttrain.support.files import locked
from posttrain.support.records import read_object
from posttrain.weights.run_folders import RUN, run_problem

State = Literal["waiting", "training", "trained", "evaluating", "finished"]
HELD_OUT = "heldout/"
"""How the names of the held-out scores begin in the metrics."""
ROWS = 20
"""The rate is that of the last so many recorded rows."""


@dataclass
class StageStatus:
    """How far one stage is, or the evaluation of the base model. What is not known is None or empty."""

    name: str
    state: State
    """``trained``: its weights are published, its evaluation has not begun."""
    step: int | None = None
    """The last optimizer step that is recorded; of a finished stage, those that it took."""
    steps: int | None = None
    """The steps of its recipe."""
    steps_per_second: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    """Of training, at that rate; None unless it is training and a process is at work."""
    seconds_since_record: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Loss and reward, as recorded last."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Score -> its mean in the last reading while it trains."""
    scores: dict[str, float] = field(default_factory=dict)
    """Score -> its mean in the evaluation."""
    evaluated: list[int] | None = None
    """Images measured and all images of an evaluation in progress."""
    checkpoint: int | None = None
    """The step of the last checkpoint."""
    seconds_since_checkpoint: float | None = None
    alarms: list[str] = field(default_factory=list)
    refused_steps: int = 0
    damage: list[str] = field(default_factory=list)
    """A line for each file that is damaged or missing, although the rest can be read."""


@dataclass
class RunStatus:
    """How far a run is."""

    name: str
    folder: str
    running: bool | None
    """Whether a process holds the folder; None if that cannot be told."""
    stages: list[StageStatus]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return all(stage.state == "finished" for stage in self.stages)


def status_of(run: Path) -> RunStatus:
    """How far the run in folder ``run`` is. Raises PosttrainError if there is none, or if it is damaged."""
    if (problem := run_problem(run)) is not None:
        raise PosttrainError(problem)
    description = read_object(run / RUN, "name", "stages")
    recipe = _yaml(run / RECIPE)
    evaluated = recipe.get("evaluation") is not None
    names = [row["name"] for row in description["stages"]]
    stages = [_stage(run / name, recipe, evaluated) for name in names if name != BASE or evaluated]
    running = _is_running(run)
    if running is False:
        for stage in stages:
            stage.seconds_left = None
    return RunStatus(description["name"], str(run), running, stages)


def _stage(folder: Path, run_recipe: Mapping[str, Any], evaluated: bool) -> StageStatus:
    status = StageStatus(folder.name, "waiting")
    _evaluation(status, folder / "evaluation")
    if folder.name == BASE:
        return status
    own = _yaml(folder / RECIPE) or run_recipe
    blocks = (block for block in own.get("stages", ()) if block.get("name") == folder.name)
    status.steps = next(blocks, {}).get("train", {}).get("steps")
    _checkpoint(status, folder)
    rows = read_metrics(folder / METRICS)
    _training(status, rows)
    summary = _object(folder / SUMMARY, "steps")
    status.damage += damage_of(
        folder, is_finished=summary is not None, is_evaluated=status.state == "finished"
    )
    if summary is not None:
        status.step, status.alarms = summary.get("steps"), list(summary.get("alarms", ()))
        status.images_per_second = summary.get("images_per_second")
        if status.state == "waiting":
            status.state = "trained" if evaluated else "finished"
    elif rows or (folder / RECIPE).is_file():
        status.state = "training"
        status.seconds_since_record = _age(folder / METRICS)
        if status.steps_per_second and status.steps and status.step is not None:
            passed = status.seconds_since_record or 0.0
            left = (status.steps - status.step) / status.steps_per_second - passed
            status.seconds_left = max(left, 0.0)
    return status


def _evaluation(status: StageStatus, folder: Path) -> None:
    """Take over an evaluation's scores, or how far it is."""
    card, _, damage = read_what_is_whole(folder, "mean")
    if damage and folder.is_dir():  # else the run put it aside meanwhile
        status.damage.append(damage)
    elif card:
        status.state = "finished"
        status.scores = {name: score["mean"] for name, score in card.get("scores", {}).items()}
    elif (draft := _object(folder / CLAIM, "prompts", "sampler")) is not None:
        status.state = "evaluating"
        size = draft["sampler"].get("batch_size", 1)
        images = draft["prompts"].get("rows", 0) * draft["sampler"].get("images_per_prompt", 1)
        done = sum(path.is_dir() and not path.name.startswith(".") for path in (folder / PARTS).glob("*"))
        status.evaluated = [min(done * size, images), images]


def _training(status: StageStatus, rows: Sequence[Mapping[str, Any]]) -> None:
    """Take over what is recorded of optimizer steps, readings and alarms."""
    steps, status.alarms = [row for row in rows if "learning_rate" in row], alarms_of(rows)
    if steps:
        last = steps[-1]
        status.step, status.images_per_second = last["step"], last.get("images_per_second")
        status.metrics = {name: last[name] for name in ("loss", "reward") if name in last}
        status.steps_per_second = _rate(steps[-ROWS:])
    for row in rows:
        for name, value in row.items():
            if name.startswith(HELD_OUT):
                status.held_out[name.removeprefix(HELD_OUT)] = value
        status.refused_steps += "refused_steps" in row


def _rate(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Steps per second between the first and the last of ``rows``; None if they are one."""
    steps, seconds = (rows[-1][name] - rows[0][name] for name in ("step", "time"))
    return steps / seconds if steps > 0 and seconds > 0 else None


def _checkpoint(status: StageStatus, folder: Path) -> None:
    if written := saved(folder / "checkpoints"):
        status.checkpoint = step_of(written[-1])
        status.seconds_since_checkpoint = _age(written[-1])


def _age(file: Path) -> float | None:
    """Seconds since ``file`` was written; None if it is gone."""
    try:
        return max(time.time() - file.stat().st_mtime, 0.0)
    except OSError:
        return None


def _is_running(run: Path) -> bool | None:
    """Whether a process holds the lock of the run."""
    if not (run / ".lock").is_file():
        return False
    try:
        with locked(run / ".lock", wait=False) as free:
            return not free
    except OSError:  # another user's run: its lock may not be opened
        return None


def _object(file: Path, *keys: str) -> dict[str, Any] | None:
    """The JSON object in ``file``, which must have ``keys``; None without a file. Raises DamagedError."""
    try:
        return read_object(file, *keys) if file.is_file() else None
    except DamagedError:
        if file.is_file():
            raise
        return None  # the run renamed or removed it meanwhile


def _yaml(file: Path) -> dict[str, Any]:
    """A recipe as it is written; empty if there is none. Types of plug-ins need not be here. Raises
    DamagedError."""
    if not file.is_file():
        return {}
    try:
        content = YAML(typ="safe", pure=True).load(file.read_text("utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise DamagedError(f"{str(file)!r} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{str(file)!r} is damaged: it is no recipe")
    return content
