"""Finds the settings to draw a model's images with where the command line does not give them.

They are those of the run that trained the model, or of the model itself. The user is told which came from
where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import PromptFile, ShapesPrompts
from posttrain.errors import PosttrainError, RecipeError
from posttrain.flow.sampling_settings import Sampling
from posttrain.recipe.schema import Recipe, Stage
from posttrain.stages.artifact import usual_settings
from posttrain.stages.checkpoint_model import is_checkpoint
from posttrain.stages.stage_state import RECIPE, recorded
from posttrain.support.paths import expanded
from posttrain.weights.run_folders import FINAL, is_run, last_stage

SAMPLING = tuple(Sampling.model_fields)
"""The settings of sampling: resolution, steps, guidance, solver, precision and seed."""


class Source(NamedTuple):
    """Settings by name, and where they are from."""

    place: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """The run and the stage that a model is from."""

    run: Path
    stage: str
    """``base`` for the run's base model."""
    recipe: Recipe
    """By which the stage was trained."""

    @property
    def place(self) -> str:
        """How messages name the recipe."""
        return f"the recipe of {self.run / self.stage}"

    def stage_block(self) -> Stage | None:
        """The stage's block in the recipe; None for ``base``."""
        return next((stage for stage in self.recipe.stages if stage.name == self.stage), None)


def origin_of(path: str) -> Origin | None:
    """Where the model at ``path`` is from: a folder of a run, of a stage, ``final``, or a checkpoint.

    None for a model outside a run. Raises RecipeError where the recipe by which it was
    trained cannot be read.
    """
    place = place_in_run(path)
    return None if place is None else Origin(*place, recorded(*place))


def place_in_run(path: str) -> tuple[Path, str] | None:
    """The folder of the run, as it was given, and the name of the stage at ``path``; None outside a run."""
    folder = expanded(path)
    if is_checkpoint(path):
        folder = folder.parent.parent
    elif folder.name == FINAL and not is_run(folder.parent):
        folder = folder.parent
    if is_run(folder):
        stage = last_stage(folder)
        return None if stage is None else (folder, stage)
    run = folder.parent
    return (run, folder.name) if folder.name and (run / folder.name / RECIPE).is_file() else None


def sources_of(path: str, base: str | None = None) -> list[Source]:
    """The sources of settings for images of the model at ``path``, the first one counting most.

    They are the evaluation of the run's recipe, the data of the stage, the size and the guidance that
    the model is made for, and the defaults, which say so if the recipe cannot be read. Of an evaluation
    ``prompts`` and ``rewards`` are given too. Raises ModelError.
    """
    sources, origin, unread = [], None, ""
    try:
        origin = origin_of(path)
    except RecipeError as error:
        unread = f" (no recipe could be read: {error})"
    if origin is not None:
        if (evaluation := origin.recipe.evaluation) is not None:
            names = {*SAMPLING, "images_per_prompt", "prompts", "rewards", "batch_size", "grid"}
            settings = {name: getattr(evaluation, name) for name in evaluation.model_fields if name in names}
            sources.append(Source(origin.place, settings))
        elif (stage := origin.stage_block()) is not None:
            sources.append(Source(f"the data of {origin.place}", _of_data(stage)))
    if usual := usual_settings(path, base):
        sources.append(Source("the model", usual))
    return [*sources, Source(f"posttrain's defaults{unread}", Sampling.model_validate({}).model_dump())]


def settled(sources: Sequence[Source], names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings ``names`` as the first source has them that has any, and a line for each source used."""
    found: dict[str, Any] = {}
    lines = []
    for source in sources:
        new = {name: source.settings[name] for name in names if name in {*source.settings} - {*found}}
        found |= new
        if new:
            told = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in new.items())
            lines.append(f"from {source.place}: {told}")
    return found, lines


def first_prompts(prompts: PromptFile | ShapesPrompts, count: int, place: str) -> list[str]:
    """The first ``count`` distinct prompts. Raises PosttrainError if the file is gone."""
    try:
        rows = prompt_rows(prompts)
    except (PosttrainError, OSError) as error:
        raise PosttrainError(
            f"the prompts of {place} cannot be read ({error}): give some: --prompt"
        ) from error
    return list(dict.fromkeys(row["prompt"] for row in rows))[:count]


def _of_data(stage: Stage) -> dict[str, Any]:
    """What the data of a stage tell of its images."""
    side = getattr(stage.data, "resolution", None)
    prompts = getattr(stage.data, "prompts", None)
    return {
        **({} if side is None else {"resolution": side}),
        **({} if prompts is None else {"prompts": prompts}),
    }


def _shown(value: Any) -> str:
    """A setting's value, as a line shows it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, PromptFile):
        return str(value.path)
    if isinstance(value, ShapesPrompts):
        return f"({value.count} of Shapes)"
    if isinstance(value, list):
        return ", ".join(getattr(item, "label", str(item)) for item in value)
    return str(value)
