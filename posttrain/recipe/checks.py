"""What is wrong with a valid recipe on this machine, as far as can be found before a weight is loaded?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import Images, PromptData, PromptFile, ShapesPrompts
from posttrain.errors import DataError
from posttrain.optim.optimizers import problem as optimizer_problem
from posttrain.recipe.schema import Recipe
from posttrain.recipe.suites import published_where
from posttrain.support.paths import is_path
from posttrain.support.spelling import meant
from posttrain.support.wording import no_multiple

if TYPE_CHECKING:
    from posttrain.recipe.positions import Place
    from posttrain.reward import Reward

Problem = tuple["Place", str]
ARTIFACTS = ("model_index.json", "*.safetensors")
"""What a folder of weights has one of: a pipeline, an adapter, or a transformer in one or more files."""


def problems(recipe: Recipe) -> list[Problem]:
    """(place in the recipe, what is wrong there), for files, devices, packages and model configurations."""
    return [*_device(recipe), *_model(recipe), *_cache(recipe), *_stages(recipe), *_evaluation(recipe)]


def _device(recipe: Recipe) -> Iterator[Problem]:
    from posttrain.errors import RecipeError
    from posttrain.support.device import resolve

    try:
        resolve(recipe.device)
    except RecipeError as error:
        yield ("device",), str(error).removeprefix("device: ")


def _model(recipe: Recipe) -> Iterator[Problem]:
    if (reason := recipe.model.missing()) is not None:
        yield ("model", "path"), reason.removeprefix("model.path: ")


def _cache(recipe: Recipe) -> Iterator[Problem]:
    folder = recipe.cache.folder()
    if (recipe.cache.prompts or recipe.cache.latents != "off") and folder.exists() and not folder.is_dir():
        yield ("cache", "path"), f"{str(folder)!r} is a file, a folder is expected"


def _stages(recipe: Recipe) -> Iterator[Problem]:
    readable = recipe.model.missing() is None
    shapes = recipe.model.transformer_shapes() if readable else None
    divisor = recipe.model.divisor() if readable else None
    names: dict[str, str] = {}
    for i, stage in enumerate(recipe.stages):
        at: Place = ("stages", i)
        if (words := optimizer_problem(stage.train.optimizer)) is not None:
            yield (*at, "train", "optimizer"), words
        if (same := names.setdefault(stage.name.lower(), stage.name)) != stage.name:
            yield (*at, "name"), f"{stage.name!r} and {same!r} are one folder where case does not count"
        if stage.start_from is not None and is_path(stage.start_from):
            yield from _artifact((*at, "start_from"), Path(stage.start_from).expanduser())
        if stage.reference is not None and is_path(stage.reference):
            yield from _artifact((*at, "reference"), Path(stage.reference).expanduser())
        yield from _rewards((*at, "rewards"), stage.rewards)
        if isinstance(stage.data, PromptData):
            yield from _prompts((*at, "data", "prompts"), stage.data.prompts, stage.rewards)
            if divisor and stage.data.resolution % divisor:
                yield (*at, "data", "resolution"), no_multiple(stage.data.resolution, divisor)
        if isinstance(stage.data, Images):
            yield from _file((*at, "data", "images"), stage.data.images)
            folder = stage.data.image_dir
            if folder is not None and not folder.is_dir():
                yield (*at, "data", "image_dir"), f"no folder {str(folder)!r} (looked at {folder.absolute()})"
            resolution = stage.data.resolution
            if resolution is not None and divisor and resolution % divisor:
                yield (*at, "data", "resolution"), no_multiple(resolution, divisor)
        if shapes is not None and stage.tune.trainable_parameters(shapes) == 0:
            layers = sorted({n.rsplit(".", 1)[0].split(".", 2)[-1] for n in shapes if "attn" in n})
            wrong = stage.tune.model_dump().get("targets", [])
            hint = meant(wrong[0], layers) if wrong else ""
            yield (*at, "tune", "targets"), f"nothing would be trained: no layer's name ends in {wrong}{hint}"


def _evaluation(recipe: Recipe) -> Iterator[Problem]:
    if (evaluation := recipe.evaluation) is None:
        return
    yield from _prompts(("evaluation", "prompts"), evaluation.prompts, evaluation.rewards)
    divisor = recipe.model.divisor() if recipe.model.missing() is None else None
    if divisor and evaluation.resolution % divisor:
        yield ("evaluation", "resolution"), no_multiple(evaluation.resolution, divisor)
    yield from _rewards(("evaluation", "rewards"), evaluation.rewards)


def _prompts(
    place: Place, prompts: PromptFile | ShapesPrompts, rewards: Sequence[Reward]
) -> Iterator[Problem]:
    missing = list(_file(place, prompts.path)) if isinstance(prompts, PromptFile) else []
    if missing and isinstance(prompts, PromptFile) and (where := published_where(prompts.path)) is not None:
        missing = [(at, f"{words}; it is published as {where}") for at, words in missing]
    yield from missing
    if not missing:
        try:
            prompt_rows(prompts, rewards)
        except DataError as error:
            yield place, " ".join(str(error).split())


def _rewards(place: Place, rewards: Sequence[Reward]) -> Iterator[Problem]:
    for i, reward in enumerate(rewards):
        if (words := reward.problem()) is not None:
            yield (*place, i), words


def _file(place: Place, file: Path) -> Iterator[Problem]:
    if file.is_dir():
        yield place, f"{str(file)!r} is a folder, a file is expected"
    elif not file.is_file():
        yield (
            place,
            f"no file {str(file)!r} (looked at {file.absolute()}; paths count from the current folder)",
        )


def _artifact(place: Place, folder: Path) -> Iterator[Problem]:
    if not folder.is_dir():
        yield place, f"no folder {str(folder)!r} (looked at {folder.absolute()})"
    elif not any(any(folder.glob(name)) for name in ARTIFACTS):
        inside = " (its folder 'final' is what to name)" if (folder / "final").is_dir() else ""
        yield place, f"{str(folder)!r} holds no weights{inside}: none of {', '.join(ARTIFACTS)}"
