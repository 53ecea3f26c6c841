"""Finds the weights that a path into a run means: a run's folder, a stage's, or what the stage published."""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import DamagedError
from posttrain.support.paths import expanded, folder_problem, is_file, is_folder
from posttrain.support.records import read_object

FINAL, RUN, SUMMARY, REPORT = "final", "run.json", "stage.json", "report.html"
"""The folder that a finished stage publishes; in a run's folder, its description; in a finished stage's, what
it cost; in a run's folder, the page of its results."""
DESCRIPTION = "posttrain.json"
"""In what a stage publishes, the model that it is of, and what it was made from."""


def weights_folder(folder: Path) -> Path:
    """The folder that holds the weights: ``final`` of the stage in ``folder``, or of a run's last finished
    stage. Any other folder is returned unchanged."""
    if (stage := last_stage(folder)) is not None:
        folder = folder / stage
    return folder / FINAL if not is_run(folder) and is_folder(folder / FINAL) else folder


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a run."""
    return is_file(folder / RUN)


def run_problem(folder: Path) -> str | None:
    """Why ``folder`` is not that of a run; None if it is."""
    if is_run(folder):
        return None
    if not is_folder(folder):
        return folder_problem(folder)
    hint = f"; its run is {str(folder.parent)!r}" if is_run(folder.parent) else ""
    return f"{str(folder)!r} holds no run (no {RUN}){hint}"


def last_stage(folder: Path) -> str | None:
    """The name of the last stage that is finished, in the order of the recipe; None without one, or where
    ``folder`` is no run's."""
    if not is_run(folder):
        return None
    try:
        rows = read_object(folder / RUN, "stages")["stages"]
        names = [row["name"] for row in rows]
    except (DamagedError, TypeError, KeyError):
        return None
    finished = (n for n in reversed(names) if is_file(folder / n / SUMMARY) and is_folder(folder / n / FINAL))
    return next(finished, None)


def meaning_of(path: str | Path) -> str | None:
    """A line that says which stage a run's folder stands for; None if ``path`` names no run's folder."""
    stage = last_stage(expanded(path))
    return None if stage is None else f"{path} is a run: its last finished stage is {stage}"
