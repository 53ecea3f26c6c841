"""Removes what stages of a run wrote, so that they begin anew."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.recipe.deciding import ancestors
from posttrain.recipe.schema import BASE, Recipe
from posttrain.stages.stage_state import RECIPE, Note, recorded
from posttrain.support.files import remove
from posttrain.support.heartbeat import note_begun_anew
from posttrain.support.spelling import meant


def to_begin_anew(folder: Path, recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The stages ``names`` of a run, and all in its ``folder`` that were trained from their weights.

    Each comes after those that were trained from it. ``base`` stands for all stages and the evaluation of the
    base model. Raises RecipeError if a stage does not exist.
    """
    known = [BASE, *(stage.name for stage in recipe.stages)]
    for name in names:
        if name not in known:
            raise RecipeError(
                f"--fresh {name}: no such stage{meant(name, known)}; there are {', '.join(known)}"
            )
    if not names:
        return []
    written = [path.parent.name for path in folder.glob(f"*/{RECIPE}")]
    there = [name for name in reversed(dict.fromkeys([*known, *written])) if (folder / name).is_dir()]
    return [n for n in there if {n, BASE, *_trained_from(folder, recipe, n)} & {*names}]


def begin_anew(folder: Path, names: Sequence[str], note: Note) -> None:
    """Remove the folders of the stages ``names`` of a run, as :func:`to_begin_anew` orders them.

    The last of a chain comes first: a kill in between leaves none whose parent is gone. Afterwards the
    command that goes on is the one without ``--fresh``.
    """
    for name in names:
        remove(folder / name)
        note(f"{name}: removed what it wrote; it begins anew")
    note_begun_anew()


def _trained_from(folder: Path, recipe: Recipe, name: str) -> list[str]:
    """The stages from whose weights the one in the run's folder ``name`` was trained."""
    with contextlib.suppress(RecipeError):  # it may not say; then the recipe of now tells
        recipe = recorded(folder, name)
    return ancestors(recipe, name)
