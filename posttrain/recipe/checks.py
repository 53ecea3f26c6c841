"""Checks a valid recipe against this machine (files, devices, packages, models) before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import Images, PromptData, PromptFile, ShapesPrompts
from posttrain.errors import DataError, RecipeError
from posttrain.optim.optimizers import problem as optimizer_problem
from posttrain.recipe.messages import FieldProblem
from posttrain.recipe.schema import Recipe, Stage
from posttrain.recipe.suites import published_where
from posttrain.registry import FieldPath
from posttrain.support.paths import is_path
from posttrain.support.spelling import meant
from posttrain.support.wording import no_multiple

if TYPE_CHECKING:
    from posttrain.model import Model
    from posttrain.reward import Reward

WEIGHT_FILES = ("model_index.json", "*.safetensors")
"""A folder of weights has one of these: a pipeline's index, or the files of an adapter or a transformer."""


def machine_problems(recipe: Recipe) -> list[FieldProblem]:
    """What prevents ``recipe`` from running on this machine, with the field that is to be changed."""
    model = _ModelFacts.of(recipe.model)
    return [
        *_device(recipe),
        *_model(recipe),
        *_cache(recipe),
        *_stages(recipe, model),
        *_evaluation(recipe, model),
    ]


@dataclass(frozen=True)
class _ModelFacts:
    """What is known of a model without loading it; None if its files are missing or do not say."""

    shapes: Mapping[str, tuple[int, ...]] | None
    """Name -> shape of the transformer's weights."""
    divisor: int | None
    """Image sides must be multiples of this many pixels."""

    @classmethod
    def of(cls, model: Model) -> _ModelFacts:
        if model.missing() is not None:
            return cls(None, None)
        return cls(model.transformer_shapes(), model.divisor())


def _device(recipe: Recipe) -> Iterator[FieldProblem]:
    from posttrain.support.device import resolve

    try:
        resolve(recipe.device)
    except RecipeError as error:
        yield ("device",), str(error).removeprefix("device: ")


def _model(recipe: Recipe) -> Iterator[FieldProblem]:
    if (reason := recipe.model.missing()) is not None:
        yield ("model", "path"), reason.removeprefix("model.path: ")


def _cache(recipe: Recipe) -> Iterator[FieldProblem]:
    folder = recipe.cache.folder()
    if (recipe.cache.prompts or recipe.cache.latents != "off") and folder.exists() and not folder.is_dir():
        yield ("cache", "path"), f"{str(folder)!r} is a file, a folder is expected"


def _stages(recipe: Recipe, model: _ModelFacts) -> Iterator[FieldProblem]:
    names: dict[str, str] = {}
    for i, stage in enumerate(recipe.stages):
        if (same := names.setdefault(stage.name.lower(), stage.name)) != stage.name:
            message = f"{stage.name!r} and {same!r} are one folder on systems that ignore case"
            yield ("stages", i, "name"), message
        yield from _stage(("stages", i), stage, model)


def _stage(path: FieldPath, stage: Stage, model: _ModelFacts) -> Iterator[FieldProblem]:
    if (message := optimizer_problem(stage.train.optimizer)) is not None:
        yield (*path, "train", "optimizer"), message
    for field in ("start_from", "reference"):
        weights = getattr(stage, field)
        if weights is not None and is_path(weights):
            yield from _weights((*path, field), Path(weights).expanduser())
    yield from _rewards((*path, "rewards"), stage.rewards)
    if isinstance(stage.data, PromptData):
        yield from _prompts((*path, "data", "prompts"), stage.data.prompts, stage.rewards)
        yield from _resolution((*path, "data", "resolution"), stage.data.resolution, model)
    elif isinstance(stage.data, Images):
        yield from _file((*path, "data", "images"), stage.data.images)
        folder = stage.data.image_dir
        if folder is not None and not folder.is_dir():
            message = f"no folder {str(folder)!r} (looked at {folder.absolute()})"
            yield (*path, "data", "image_dir"), message
        yield from _resolution((*path, "data", "resolution"), stage.data.resolution, model)
    if model.shapes is not None and stage.tune.trainable_parameters(model.shapes) == 0:
        layers = sorted({n.rsplit(".", 1)[0].split(".", 2)[-1] for n in model.shapes if "attn" in n})
        targets = stage.tune.model_dump().get("targets", [])
        hint = meant(targets[0], layers) if targets else ""
        message = f"nothing would be trained: no layer's name ends in {targets}{hint}"
        yield (*path, "tune", "targets"), message


def _evaluation(recipe: Recipe, model: _ModelFacts) -> Iterator[FieldProblem]:
    if (evaluation := recipe.evaluation) is None:
        return
    yield from _prompts(("evaluation", "prompts"), evaluation.prompts, evaluation.rewards)
    yield from _resolution(("evaluation", "resolution"), evaluation.resolution, model)
    yield from _rewards(("evaluation", "rewards"), evaluation.rewards)


def _resolution(path: FieldPath, resolution: int | None, model: _ModelFacts) -> Iterator[FieldProblem]:
    if resolution is not None and model.divisor and resolution % model.divisor:
        yield path, no_multiple(resolution, model.divisor)


def _prompts(
    path: FieldPath, prompts: PromptFile | ShapesPrompts, rewards: Sequence[Reward]
) -> Iterator[FieldProblem]:
    if isinstance(prompts, PromptFile) and (missing := list(_file(path, prompts.path))):
        published = published_where(prompts.path)
        where = f"; it is published as {published}" if published is not None else ""
        yield from ((at, f"{message}{where}") for at, message in missing)
        return
    try:
        prompt_rows(prompts, rewards)
    except DataError as error:
        yield path, " ".join(str(error).split())


def _rewards(path: FieldPath, rewards: Sequence[Reward]) -> Iterator[FieldProblem]:
    for i, reward in enumerate(rewards):
        if (message := reward.problem()) is not None:
            yield (*path, i), message


def _file(path: FieldPath, file: Path) -> Iterator[FieldProblem]:
    if file.is_dir():
        yield path, f"{str(file)!r} is a folder, a file is expected"
    elif not file.is_file():
        where = f"looked at {file.absolute()}; relative paths start at the current folder"
        yield path, f"no file {str(file)!r} ({where})"


def _weights(path: FieldPath, folder: Path) -> Iterator[FieldProblem]:
    if not folder.is_dir():
        yield path, f"no folder {str(folder)!r} (looked at {folder.absolute()})"
    elif not any(any(folder.glob(name)) for name in WEIGHT_FILES):
        hint = " (name its folder 'final' instead)" if (folder / "final").is_dir() else ""
        yield path, f"{str(folder)!r} holds no weights{hint}: none of {', '.join(WEIGHT_FILES)}"
