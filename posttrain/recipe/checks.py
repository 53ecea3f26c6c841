"""Checks a valid recipe against this machine (files, devices, packages, models) before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import PromptFile, ShapesPrompts
from posttrain.engine.service import service_problem
from posttrain.errors import DamagedError, DataError, RecipeError
from posttrain.flow.sampling_settings import GUIDANCE
from posttrain.optim.optimizers import problem as optimizer_problem
from posttrain.policy.packed import problem as packing_problem
from posttrain.recipe.messages import FieldProblem
from posttrain.recipe.schema import Recipe, Stage
from posttrain.recipe.suites import published_where
from posttrain.registry import FieldPath, Spec
from posttrain.support.paths import expanded, file_problem, folder_problem, is_file, is_path
from posttrain.support.records import read_object
from posttrain.support.spelling import meant
from posttrain.support.wording import no_multiple
from posttrain.weights.run_folders import DESCRIPTION, is_run, last_stage, weights_folder

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
        *_tracker(recipe),
        *_model(recipe),
        *_cache(recipe),
        *_stages(recipe, model),
        *_evaluation(recipe, model),
        *model_problems(recipe),
    ]


def model_problems(recipe: Recipe) -> list[FieldProblem]:
    """What the configuration of the model refuses on any machine, with the field that is to be changed."""
    if recipe.model.missing() is not None:
        return []
    unfit = recipe.model.field_problems().items()
    return [*((("model", field), problem) for field, problem in unfit), *_guidance(recipe)]


@dataclass(frozen=True)
class _ModelFacts:
    """What is known of a model without loading it; None if its files are missing or do not say."""

    shapes: Mapping[str, tuple[int, ...]] | None
    """Name -> shape of the transformer's weights."""
    sides: tuple[int, int | None] | None
    """What image sides must be multiples of, and the longest, in pixels."""
    type: str | None
    """The type of its artifacts; None for a model that builds one of another type, and for a class of the
    user's, which may load what another one wrote."""

    @classmethod
    def of(cls, model: Model) -> _ModelFacts:
        from posttrain.model import Model as Loadable

        kind = type(model)
        ours = kind.__module__.startswith("posttrain.") and kind.build is Loadable.build
        own = model.type if ours else None
        if model.missing() is not None:
            return cls(None, None, own)
        return cls(model.transformer_shapes(), model.sides(), own)


def _device(recipe: Recipe) -> Iterator[FieldProblem]:
    from posttrain.support.device import resolve

    try:
        resolve(recipe.device)
    except RecipeError as error:
        yield ("device",), str(error).removeprefix("device: ")


def _tracker(recipe: Recipe) -> Iterator[FieldProblem]:
    if (reason := service_problem(recipe.tracker)) is not None:
        yield ("tracker",), reason


def _model(recipe: Recipe) -> Iterator[FieldProblem]:
    if (reason := recipe.model.missing()) is not None:
        yield ("model", "path"), reason


def _cache(recipe: Recipe) -> Iterator[FieldProblem]:
    folder = recipe.cache.folder()
    if (recipe.cache.prompts or recipe.cache.latents != "off") and is_file(folder):
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
    if (message := packing_problem(stage.tune.packing)) is not None:
        yield (*path, "tune", "base"), message
    for field in ("start_from", "reference"):
        weights = getattr(stage, field)
        if weights is not None and is_path(weights):
            yield from _weights((*path, field), expanded(weights), model)
    yield from _rewards((*path, "rewards"), stage.rewards)
    # the two fields that data classes share by name: see posttrain.data.family
    if isinstance(prompts := getattr(stage.data, "prompts", None), PromptFile | ShapesPrompts):
        yield from _prompts((*path, "data", "prompts"), prompts, stage.rewards)
    yield from (((*path, "data", field), message) for field, message in stage.data.problems())
    if (side := getattr(stage.data, "resolution", None)) is not None:
        yield from _resolution((*path, "data", "resolution"), side, model)
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


def _guidance(recipe: Recipe) -> Iterator[FieldProblem]:
    """The guidance scales that the model cannot take."""
    rule = recipe.model.guidance_rule()
    blocks: list[tuple[FieldPath, Spec]] = [
        (("stages", i, "algorithm"), stage.algorithm) for i, stage in enumerate(recipe.stages)
    ]
    if recipe.evaluation is not None:
        blocks.append((("evaluation",), recipe.evaluation))
    for path, block in blocks:
        for name, field in type(block).model_fields.items():
            scale = getattr(block, name)
            if GUIDANCE in field.metadata and (reason := rule.problem(scale)) is not None:
                yield (*path, name), f"{scale:g}: {reason}"


def _resolution(path: FieldPath, side: int, model: _ModelFacts) -> Iterator[FieldProblem]:
    if model.sides is None:
        return
    divisor, longest = model.sides
    if side % divisor:
        yield path, no_multiple(side, divisor)
    if longest is not None and side > longest:
        yield path, f"{side} is too large: this model's sides have at most {longest} pixels"


def _prompts(
    path: FieldPath, prompts: PromptFile | ShapesPrompts, rewards: Sequence[Reward]
) -> Iterator[FieldProblem]:
    if isinstance(prompts, PromptFile) and (missing := file_problem(prompts.path)) is not None:
        published = published_where(prompts.path)
        yield path, f"{missing}; it is published as {published}" if published is not None else missing
        return
    try:
        prompt_rows(prompts, rewards)
    except DataError as error:
        yield path, " ".join(str(error).split())


def _rewards(path: FieldPath, rewards: Sequence[Reward]) -> Iterator[FieldProblem]:
    for i, reward in enumerate(rewards):
        if (message := reward.problem()) is not None:
            yield (*path, i), message


def _weights(path: FieldPath, folder: Path, model: _ModelFacts) -> Iterator[FieldProblem]:
    if (message := folder_problem(folder)) is not None:
        yield path, message
    elif is_run(folder) and last_stage(folder) is None:
        yield path, f"{str(folder)!r} is a run of which no stage is finished"
    elif not any(any(weights_folder(folder).glob(name)) for name in WEIGHT_FILES):
        yield path, f"{str(folder)!r} holds no weights: none of {', '.join(WEIGHT_FILES)}"
    elif (made_of := _type_of(weights_folder(folder))) not in (None, model.type) and model.type is not None:
        yield path, f"{str(folder)!r} has weights of the model type {made_of!r}, not of {model.type!r}"


def _type_of(folder: Path) -> str | None:
    """The type of the model that a stage published in ``folder``; None if it does not say."""
    try:
        return read_object(folder / DESCRIPTION).get("model", {}).get("type")
    except (DamagedError, AttributeError):  # loading tells what is damaged
        return None
