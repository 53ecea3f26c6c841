"""Tells from a stage's folder how far the stage is, and by which recipe it was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.engine import tracker
from posttrain.engine.tracker import METRICS
from posttrain.errors import DamagedError, ModelError, PosttrainError, RecipeError
from posttrain.recipe.file import dump_recipe, parse_recipe
from posttrain.recipe.positions import read_file
from posttrain.recipe.schema import BASE, Recipe
from posttrain.stages.lineage import EXACT, FINAL, described
from posttrain.support.files import write
from posttrain.support.records import read_object
from posttrain.weights.files import file_header, weight_files
from posttrain.weights.pipeline_folder import INDEX, index_in

RECIPE, SUMMARY = "recipe.yaml", "stage.json"
"""In a stage's folder: the recipe by which it was trained, and what the finished stage cost. The run's folder
has a recipe too, that of its last start."""

Note = Callable[[str], None]
"""Tells the user one line."""


@dataclass(frozen=True)
class Ended:
    """How an alarm ended a stage."""

    step: int
    """The step after which it ended, or to which it was rolled back."""
    alarms: list[str]


def last_step(folder: Path) -> int | None:
    """The optimizer steps that the last checkpoint of the stage in ``folder`` holds; None without one."""
    from posttrain.engine.checkpoint_folder import saved, step_of

    checkpoints = saved(folder / "checkpoints")
    return step_of(checkpoints[-1]) if checkpoints else None


def steps_taken(folder: Path) -> int | None:
    """The steps that the stage in ``folder`` has taken and kept; None if it has not begun."""
    if not (file := folder / SUMMARY).exists():
        return last_step(folder)
    if type(steps := read_object(file, "steps")["steps"]) is not int:
        raise DamagedError(f"{str(file)!r} is damaged: its 'steps' are {steps!r}")
    return steps


def recorded(run_folder: Path, name: str, note: Note | None = None) -> Recipe:
    """The recipe by which the stage ``name`` was trained, or by which ``base`` was evaluated.

    It is in the stage's folder. If that file is damaged, or missing as in runs of versions that did not write
    it, the run's recipe stands in for it; with ``note`` the file is then written. Raises RecipeError where
    neither file can be read or has the stage.
    """
    own, problems = run_folder / name / RECIPE, []
    for file in (own, run_folder / RECIPE):
        if not file.is_file():
            continue
        try:
            recipe = parse_recipe(whole_text(file), str(file), checks=False)
        except RecipeError as error:
            problems.append(str(error).splitlines()[0])
            continue
        if name in (BASE, *(stage.name for stage in recipe.stages)):
            if file != own and note is not None:
                for problem in problems:
                    note(f"{problem}; it is made again from the run's {RECIPE}")
                write(own, dump_recipe(recipe))
            return recipe
        problems.append(f"{file} has no stage {name!r}")
    why = "; ".join(problems) or f"there is no {RECIPE}"
    raise RecipeError(
        f"{str(run_folder / name)!r} does not say by which recipe it was made ({why}): give another "
        f"--output, or remove what it holds and begin the stage anew: posttrain run RECIPE --fresh {name}"
    )


def as_trained(recipe: Recipe, run_folder: Path) -> Recipe:
    """``recipe`` with the steps by which the stages were trained that ended early.

    Other steps have no effect on such a stage, so they may not make another of those that start from it.
    """
    stages = []
    for stage in recipe.stages:
        if (run_folder / stage.name / SUMMARY).exists():
            was = next(s for s in recorded(run_folder, stage.name).stages if s.name == stage.name)
            if (steps_taken(run_folder / stage.name) or 0) < was.train.steps:
                train = stage.train.model_copy(update={"steps": was.train.steps})
                stage = stage.model_copy(update={"train": train})
        stages.append(stage)
    return recipe.model_copy(update={"stages": stages})


def whole_text(file: Path) -> str:
    """The text of a recipe that posttrain wrote, which ends with a line's end. Raises RecipeError."""
    if not (text := read_file(file)).endswith("\n"):
        raise RecipeError(f"{file} is damaged: its end is cut off")
    return text


def mend(folder: Path, note: Note) -> Ended | None:
    """See to it that a stage whose results are damaged or gone is published again from its last checkpoint.

    Damaged lines of its metrics are left out. Returns how the stage ended, where an alarm ended it and it is
    only to be published again: if it went on, it would come to the same alarm. Raises PosttrainError where
    there is no checkpoint.
    """
    if lines := tracker.mend(folder / METRICS):
        numbers = ", ".join(map(str, lines))
        note(f"{folder / METRICS}: damaged in line {numbers}, now left out; kept as {tracker.DAMAGED}")
    if not (folder / SUMMARY).exists():
        return None
    done = None
    try:
        done = steps_taken(folder)
        dtype = described(folder / FINAL)["dtype"]
        _check_weights(folder / FINAL)
        if dtype != "fp32":
            _check_weights(folder / EXACT)
    except PosttrainError as error:
        if (step := last_step(folder)) is None:
            raise PosttrainError(
                f"{error}; {folder.name!r} has no checkpoint to make it again from. To train the stage "
                f"again: posttrain run RECIPE --fresh {folder.name}"
            ) from error
        note(f"{folder.name}: {error}; what the stage wrote is made again from its checkpoint of step {step}")
        if done is not None and done == step and _ended_early(folder, done):
            return Ended(done, read_object(folder / SUMMARY).get("alarms", []))
        (folder / SUMMARY).unlink()
    return None


def _ended_early(folder: Path, done: int) -> bool:
    """Whether the finished stage in ``folder`` took fewer steps than its recipe says."""
    trained = recorded(folder.parent, folder.name)
    return done < next(stage for stage in trained.stages if stage.name == folder.name).train.steps


def _check_weights(folder: Path) -> None:
    """Raise ModelError where weights in ``folder`` are gone, empty or cut off. Their headers tell it."""
    holding = {file.parent for file in folder.rglob("*.safetensors*")}
    if (folder / INDEX).is_file() and "transformer" in index_in(folder):
        holding.add(folder / "transformer")  # the other components' weights are no sign that these are there
    for part in sorted(holding or {folder}):
        if not (files := weight_files(part)):
            raise ModelError(f"{str(part)!r} holds no weights")
        for file in files:
            file_header(file)
