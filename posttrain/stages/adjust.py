"""Lets the run in a folder go on by a changed recipe, or says why it cannot.

Each stage is compared with the recipe by which it was trained. What changes no result may change, and so may
everything of a stage that has not begun. A finished stage is opened again only when its turn comes, after its
weights are known to be those that it was made from: what refuses it leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.evaluation.parts import put_aside
from posttrain.recipe.deciding import ancestors, deciding
from posttrain.recipe.schema import BASE, Recipe, Stage
from posttrain.stages.stage_state import SUMMARY, Ended, Note, last_step, mend, recorded, steps_taken
from posttrain.support.differences import differences
from posttrain.support.files import remove

Reopened = dict[str, Ended | None]
"""A finished stage that is opened again -> how it ended early, if it is only to be published again."""
SHOWN = 8
"""A refusal lists at most this many fields."""


@dataclass
class _Findings:
    """What the comparison of a run's stages found."""

    refused: dict[str, list[str]] = field(default_factory=dict)
    """Stage -> a line for each field that may not change."""
    reopened: Reopened = field(default_factory=dict)
    untrained: list[str] = field(default_factory=list)
    """Stages that have no checkpoint, or that would differ and only have that of step 0, for a rollback."""
    notes: list[str] = field(default_factory=list)


def adjust(folder: Path, recipe: Recipe, note: Note, fresh: Collection[str] = ()) -> Reopened:
    """Prepare the run in ``folder`` to go on by ``recipe``. Returns the finished stages to open again.

    Those are to take more steps, or to be published again. The stages ``fresh`` begin anew, so anything of
    them may differ. Raises RecipeError, before a stage is changed, where another one that has begun would
    differ.
    """
    found = _Findings()
    for stage in recipe.stages:
        if stage.name in fresh:
            continue
        if (ended := mend(folder / stage.name, note)) is not None:
            found.reopened[stage.name] = ended
        if (done := steps_taken(folder / stage.name)) is not None:
            _compare(folder, recipe, stage, done, found, note)
        else:
            found.untrained.append(stage.name)
    if found.refused:
        raise RecipeError(_refusal(folder, recipe, found.refused))
    for line in found.notes:
        note(line)
    for name in found.untrained:
        if last_step(folder / name) is not None:
            remove(folder / name / "checkpoints")
    other_base = [BASE] if BASE not in fresh and _other_base(folder, recipe, note) else []
    for name in (*other_base, *found.untrained):
        _evaluate_again(folder / name, note)
    return found.reopened


def reopen(folder: Path, note: Note) -> None:
    """Make the finished stage in ``folder`` one that goes on, and put the evaluation of its weights aside."""
    _evaluate_again(folder, note)
    (folder / SUMMARY).unlink()


def _evaluate_again(folder: Path, note: Note) -> None:
    if (kept := put_aside(folder / "evaluation")) is not None:
        note(f"{folder.name}: is evaluated again; the evaluation of other weights is kept as {kept.name}")


def _compare(folder: Path, recipe: Recipe, stage: Stage, done: int, found: _Findings, note: Note) -> None:
    """Compare ``stage``, which has taken ``done`` steps, with the recipe by which it was trained."""
    name, old = stage.name, recorded(folder, stage.name, note)
    before, now = deciding(old, name), deciding(recipe, name)
    _leave_out_incomparable(folder, before["stages"], now["stages"])
    refused = list(differences(before, now))
    was = next(s for s in old.stages if s.name == name)
    place, steps, old_steps = f"stages.{name}.train.steps", stage.train.steps, was.train.steps
    change = f"{place} (was {old_steps}, now {steps})"
    finished = (folder / name / SUMMARY).exists()
    precisions = old.export_dtype(was), recipe.export_dtype(stage)
    if finished and done < old_steps:
        dtype = f"stages.{name}.export_dtype (was {precisions[0]!r}, now {precisions[1]!r})"
        changes = [change] * (steps != old_steps) + [dtype] * (precisions[0] != precisions[1])
        found.notes += [f"{c}: no effect, the stage ended early, after step {done}" for c in changes]
    elif steps < done:
        refused.append(f"{change}: {done} steps are taken already")
    else:
        if steps != old_steps:
            found.notes.append(change + _consequence(stage, done))
        if finished and (steps > done or precisions[0] != precisions[1]):
            if last_step(folder / name) == done:
                found.reopened[name] = None
            else:
                late = change if steps > done else f"stages.{name}.export_dtype"
                refused.append(f"{late}: the stage is finished, and its checkpoint of step {done} is gone")
    if refused and done == 0:
        found.untrained.append(name)
    elif refused:
        found.refused[name] = refused


def _consequence(stage: Stage, done: int) -> str:
    """What another number of steps changes beside the length of ``stage``, which has taken ``done``."""
    schedule, steps = stage.train.schedule, stage.train.steps
    if schedule == "constant" or steps == done:
        return f": the stage ends after step {steps}"
    return (
        f": from step {done + 1} on the learning rate follows the {schedule} schedule over {steps} steps; "
        "the steps before followed another one"
    )


def _leave_out_incomparable(folder: Path, before: dict, now: dict) -> None:
    """Take out of two ``stages`` blocks what tells nothing of the last stage's weights.

    Of ancestors that only one has, ``start_from`` tells. The steps of one that ended early have no effect.
    """
    for name in before.keys() ^ now.keys():
        before.pop(name, None)
        now.pop(name, None)
    for name in before:
        old_steps = before[name]["train"].get("steps")
        if old_steps is None or not (folder / name / SUMMARY).exists():
            continue
        if (steps_taken(folder / name) or 0) < old_steps:
            now[name]["train"]["steps"] = old_steps


def _other_base(folder: Path, recipe: Recipe, note: Note) -> bool:
    """Whether the base model that was evaluated is not that of ``recipe``, or is not known."""
    if not (folder / BASE / "evaluation").is_dir():
        return False
    try:
        old = recorded(folder, BASE, note)
    except RecipeError:
        return True
    return deciding(old, BASE) != deciding(recipe, BASE)


def _refusal(folder: Path, recipe: Recipe, refused: dict[str, list[str]]) -> str:
    """The message that lists the fields, and the command that trains the stages again."""
    lines = list(dict.fromkeys(line for of_stage in refused.values() for line in of_stage))
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    first = [name for name in refused if not set(ancestors(recipe, name)) & refused.keys()]
    shown = "".join(f"\n  {line}" for line in [*lines[:SHOWN], *more])
    options = " ".join(f"--fresh {name}" for name in first)
    return (
        f"{str(folder)!r} was trained with other settings:{shown}\n"
        "Set them back, or give another --output or name. To remove what was trained, and train again from "
        f"the start: posttrain run RECIPE {options}"
    )
