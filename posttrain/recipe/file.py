"""Reads recipes from files or by shipped name, with overrides, and writes them out in full."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from posttrain.data.prompts import read_prompts
from posttrain.data.settings import PromptFile
from posttrain.errors import RecipeError
from posttrain.recipe.checks import machine_problems, model_problems
from posttrain.recipe.evaluation_block import Scoring
from posttrain.recipe.messages import listed, translated
from posttrain.recipe.overrides import apply_overrides
from posttrain.recipe.positions import Source, parse, read_file
from posttrain.recipe.reward_blocks import reward_blocks
from posttrain.recipe.schema import Evaluation, Recipe
from posttrain.recipe.suites import suite_prompts
from posttrain.registry import FieldPath
from posttrain.reward import Reward
from posttrain.support.paths import is_file
from posttrain.support.shipped import shipped
from posttrain.support.spelling import meant

Block = TypeVar("Block", bound=BaseModel)


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, checks: bool = True) -> Recipe:
    """The recipe in the file ``source``, or the shipped one of that name, with ``a.b=c`` overrides.

    Raises RecipeError with every problem and its line, before any weight is loaded. ``checks=False`` checks
    the schema and what the model refuses, not files, devices and packages: a plan may be made on another
    machine than the run's.
    """
    name, text = _text(source)
    return parse_recipe(text, name, overrides, checks=checks)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = (), *, checks: bool = True) -> Recipe:
    """As :func:`load_recipe`, for the recipe ``text`` of a file that error messages call ``name``."""
    source = parse(text, name)
    override_texts = apply_overrides(source, overrides)
    recipe = _validated(Recipe, source, override_texts)
    if checks:
        # An empty section was probably begun and forgotten. To have none, leave it out or write null.
        empty_sections = [
            path
            for path in source.empty
            if len(path) == 1 and source.data[path[0]] is None and path not in override_texts
        ]
        if empty_sections:
            problems = [(path, "is empty; write its fields, or remove it") for path in empty_sections]
            raise listed(problems, source, override_texts)
        check_or_raise(recipe, source, override_texts)
    elif problems := model_problems(recipe):
        raise listed(problems, source, override_texts)
    return recipe


def overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """``recipe`` with ``a.b=c`` overrides. Raises RecipeError if the schema refuses the result."""
    source = Source("the recipe", recipe.model_dump(mode="json"))
    return _validated(Recipe, source, apply_overrides(source, overrides))


def check_or_raise(
    recipe: Recipe, source: Source | None = None, override_texts: dict[FieldPath, str] | None = None
) -> None:
    """Raise RecipeError with every problem of :func:`posttrain.recipe.checks.machine_problems`.

    With ``source`` the message has the lines of the file.
    """
    if not (problems := machine_problems(recipe)):
        return
    if source is None:
        raise RecipeError("\n".join(f"{'.'.join(map(str, path))}: {message}" for path, message in problems))
    raise listed(problems, source, override_texts or {})


def evaluation_settings(
    suite: str | None,
    like: str | None,
    prompts: str | None,
    rewards: Sequence[str],
    overrides: Sequence[str],
    start: Mapping[str, Any] | None = None,
) -> Evaluation:
    """The evaluation that the options of ``posttrain eval`` describe.

    It starts from the evaluation of recipe ``like``, from the published ``suite``, or else from the fields
    ``start``. The ``suite``, the file ``prompts`` and the names ``rewards`` replace its prompts and rewards.
    ``overrides`` (``a.b=c``) are applied last. Raises RecipeError if prompts or rewards are missing or not
    valid, or if a reward cannot be loaded, and DataError if a prompt cannot be used.
    """
    data: dict[str, Any] = {**({} if suite is not None else start or {}), "keep": "png"}
    if like is not None:
        if (evaluation := load_recipe(like).evaluation) is None:
            raise RecipeError(f"the recipe {like!r} has no evaluation")
        data = evaluation.model_dump(mode="json")
    if suite is not None:
        prompts, suite_rewards = suite_prompts(suite, prompts)
        data["rewards"] = list(suite_rewards)
    if prompts is not None:
        data["prompts"] = prompts
    if rewards:
        data["rewards"] = reward_blocks(list(rewards))  # so that overrides can set their fields
    if "prompts" not in data or "rewards" not in data:
        options = "--suite NAME, --like RECIPE, or --prompts FILE and --reward NAME"
        raise RecipeError(f"say what to evaluate: {options}")
    source = Source("evaluation", data)
    settings = _validated(Evaluation, source, apply_overrides(source, overrides))
    _check_loadable(settings.rewards)
    if isinstance(file := settings.prompts, PromptFile):
        if not is_file(file.path):
            raise RecipeError(f"--prompts: no file {str(file.path)!r}")
        read_prompts(file.path, settings.rewards)  # refuses unusable prompts before a weight is loaded
    return settings


def chosen_rewards(names: Sequence[str], overrides: Sequence[str]) -> list[Reward]:
    """The rewards ``names``, as ``--reward`` gives them, with the settings ``overrides``, as ``--set`` does.

    An override is ``field=value`` for a single reward and ``NAME.field=value`` for one of several. Raises
    RecipeError if there is no name, or if a reward or its settings are not valid or cannot be loaded.
    """
    if not names:
        raise RecipeError("say what to score with: --reward NAME; 'posttrain rewards' lists them")
    source = Source("--reward", {"rewards": reward_blocks(list(names))})
    by_index = [_override_by_index(text, list(names)) for text in overrides]
    rewards = _validated(Scoring, source, apply_overrides(source, by_index)).rewards
    _check_loadable(rewards)
    return rewards


def _check_loadable(rewards: Sequence[Reward]) -> None:
    """Raise RecipeError with each reason why one of ``rewards`` cannot be loaded."""
    if problems := [problem for reward in rewards if (problem := reward.problem()) is not None]:
        raise RecipeError("\n".join(problems))


def _override_by_index(text: str, names: list[str]) -> str:
    """The override ``text`` of one of the rewards ``names``, with the path of its block in front."""
    name, dot, _ = text.partition("=")[0].partition(".")
    if dot and name in names:
        return f"rewards.{names.index(name)}.{text[len(name) + 1 :]}"
    if len(names) == 1:
        return f"rewards.0.{text}"
    raise RecipeError(f"--set {text}: say of which reward: {' or '.join(n + '.' for n in names)}")


def shipped_recipes() -> dict[str, str]:
    """Name -> summary (the first comment line) of each recipe that ships with posttrain, sorted by name."""
    folder = files(shipped("posttrain.recipes"))
    recipes = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=str)
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8").splitlines()[0].lstrip("# ") for f in recipes}


def recipe_text(name: str) -> str:
    """The text of the shipped recipe ``name``. Raises RecipeError if there is none."""
    known = shipped_recipes()
    if name not in known:
        raise RecipeError(f"no recipe {name!r} is shipped{meant(name, known)}; there are {', '.join(known)}")
    return (files(shipped("posttrain.recipes")) / f"{name}.yaml").read_text("utf-8")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out. It loads again to an equal recipe."""
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()  # the default type writes nothing for null
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # annotated by its default, None
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 110
    yaml.dump(recipe.model_dump(mode="json"), text)
    return text.getvalue()


def _text(source: str | Path) -> tuple[str, str]:
    """The name for error messages, and the text, of the recipe that ``source`` names."""
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(
            f"a recipe is a Recipe, a YAML file, or the name of a shipped one, not {type(source).__name__}"
        )
    path, name = Path(source), str(source)
    # a folder may have the name of a shipped recipe; only a file takes precedence
    if isinstance(source, str) and not os.path.isfile(name) and "/" not in name and not path.suffix:
        known = shipped_recipes()
        if name not in known:
            near = _near(path) or meant(name, known)
            raise RecipeError(
                f"no recipe {name!r}: neither a file here nor shipped{near}; shipped are {', '.join(known)}"
            )
        return f"{name}.yaml", recipe_text(name)
    if not os.path.lexists(name) and (near := _near(path)):
        raise RecipeError(f"no file {name!r}{near}")
    return name, read_file(path)


def _near(path: Path) -> str:
    """The hint that names the YAML file beside the missing ``path`` that it was meant to be; else nothing."""
    try:
        there = {file.stem: file.name for file in sorted(path.parent.glob("*.y*ml"))}
    except (OSError, ValueError):  # no folder can have such a name
        return ""
    near = meant(path.stem, there)
    stem = next((stem for stem in there if f"{stem!r}?" in near), None)
    return f" (did you mean {str(path.parent / there[stem])!r}?)" if stem is not None else ""


def _validated(schema: type[Block], source: Source, override_texts: dict[FieldPath, str]) -> Block:
    try:
        return schema.model_validate(source.data)
    except ValidationError as error:
        raise translated(error, schema, source, override_texts) from None
