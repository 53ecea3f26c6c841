"""How does a recipe come out of a file, with its overrides, and go back into one?"""

from __future__ import annotations

import io
import os.path
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from posttrain.data.prompts import read_prompts
from posttrain.data.settings import PromptFile
from posttrain.errors import RecipeError
from posttrain.recipe import checks
from posttrain.recipe.messages import listed, translated
from posttrain.recipe.positions import Place, Source, parse, read_file
from posttrain.recipe.reward_blocks import reward_blocks
from posttrain.recipe.schema import Evaluation, Recipe, Scoring
from posttrain.recipe.suites import suite_prompts
from posttrain.reward import Reward
from posttrain.support.shipped import shipped
from posttrain.support.spelling import meant

Model = TypeVar("Model", bound=BaseModel)


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, checks: bool = True) -> Recipe:
    """The recipe in a file, or the shipped one of that name, with ``a.b=c`` overrides.

    Raises RecipeError, telling every problem with its line, before any weight is loaded. Without ``checks``
    only the schema counts, as for a plan made elsewhere than the data.
    """
    name, text = _text(source)
    return parse_recipe(text, name, overrides, checks=checks)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = (), *, checks: bool = True) -> Recipe:
    """The recipe in ``text``; ``name`` is what errors call it. Without ``checks`` only the schema counts."""
    source = parse(text, name)
    given = _override(source, overrides)
    recipe = _validated(Recipe, source, given)
    if checks:
        # a section with nothing under it was begun and forgotten; who wants none leaves it out or says null
        unfinished = [p for p in source.empty if len(p) == 1 and source.data[p[0]] is None and p not in given]
        if unfinished:
            raise listed([(p, "is empty; write its fields, or remove it") for p in unfinished], source, given)
        check_or_raise(recipe, source, given)
    return recipe


def overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """``recipe`` with ``a.b=c`` overrides. Raises RecipeError where the schema refuses the result."""
    source = Source("the recipe", recipe.model_dump(mode="json"))
    return _validated(Recipe, source, _override(source, overrides))


def check_or_raise(
    recipe: Recipe, source: Source | None = None, given: dict[Place, str] | None = None
) -> None:
    """Raise RecipeError for what :func:`posttrain.recipe.checks.problems` finds."""
    if not (found := checks.problems(recipe)):
        return
    if source is None:
        raise RecipeError("\n".join(f"{'.'.join(map(str, place))}: {words}" for place, words in found))
    raise listed(found, source, given or {})


def evaluation_settings(
    suite: str | None,
    like: str | None,
    prompts: str | None,
    rewards: Sequence[str],
    overrides: Sequence[str],
) -> Evaluation:
    """The evaluation of recipe ``like``, or the defaults, with the prompts and rewards of a published
    ``suite``, changed as ``posttrain eval``'s other options say."""
    data: dict[str, Any] = {"keep": "png"}
    if like is not None:
        evaluation = load_recipe(like).evaluation
        if evaluation is None:
            raise RecipeError(f"the recipe {like!r} has no evaluation")
        data = evaluation.model_dump(mode="json")
    if suite is not None:
        prompts, scores = suite_prompts(suite, prompts)
        data["rewards"] = list(scores)
    if prompts is not None:
        data["prompts"] = prompts
    if rewards:
        data["rewards"] = list(rewards)
    if "prompts" not in data or "rewards" not in data:
        words = "--suite NAME, --like RECIPE, or --prompts FILE and --reward NAME"
        raise RecipeError(f"say what to evaluate: {words}")
    source = Source("evaluation", data)
    settings = _validated(Evaluation, source, _override(source, overrides))
    if isinstance(file := settings.prompts, PromptFile):
        if not file.path.is_file():
            raise RecipeError(f"--prompts: no file {str(file.path)!r}")
        read_prompts(file.path, settings.rewards)  # what cannot be scored is told before a weight is loaded
    return settings


def chosen_rewards(names: Sequence[str], overrides: Sequence[str]) -> list[Reward]:
    """The rewards that ``--reward`` names, with their fields as ``--set`` says.

    ``field=value`` is for the one reward, ``NAME.field=value`` for one of several. Raises RecipeError.
    """
    if not names:
        raise RecipeError("say what to score with: --reward NAME; 'posttrain rewards' lists them")
    source, placed = Source("--reward", {"rewards": reward_blocks(list(names))}), []
    for text in overrides:
        first, dot, _ = text.partition("=")[0].partition(".")
        if dot and first in names:
            placed.append(f"rewards.{list(names).index(first)}.{text[len(first) + 1 :]}")
        elif len(names) == 1:
            placed.append(f"rewards.0.{text}")
        else:
            raise RecipeError(f"--set {text}: say of which reward: {' or '.join(n + '.' for n in names)}")
    rewards = _validated(Scoring, source, _override(source, placed)).rewards
    if problems := [words for reward in rewards if (words := reward.problem()) is not None]:
        raise RecipeError("\n".join(problems))
    return rewards


def shipped_recipes() -> dict[str, str]:
    """Name -> first comment line of each recipe that comes with the package."""
    found = sorted(
        (f for f in files(shipped("posttrain.recipes")).iterdir() if f.name.endswith(".yaml")), key=str
    )
    return {f.name.removesuffix(".yaml"): f.read_text().splitlines()[0].lstrip("# ") for f in found}


def recipe_text(name: str) -> str:
    """A shipped recipe's file. Raises RecipeError where there is none of that name."""
    known = shipped_recipes()
    if name not in known:
        raise RecipeError(f"no recipe {name!r} is shipped{meant(name, known)}; there are {', '.join(known)}")
    return (files(shipped("posttrain.recipes")) / f"{name}.yaml").read_text()


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that loads again to an equal recipe."""
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()  # unlike the default it writes null, not nothing
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # annotated by its default, None
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 110
    yaml.dump(recipe.model_dump(mode="json"), text)
    return text.getvalue()


def _text(source: str | Path) -> tuple[str, str]:
    path, name = Path(source), str(source)
    # a folder that is called like a shipped recipe does not hide it
    if isinstance(source, str) and not os.path.isfile(name) and "/" not in name and not path.suffix:
        known = shipped_recipes()
        if name not in known:
            raise RecipeError(
                f"no recipe {name!r}: neither a file here nor shipped{meant(name, known)}; "
                f"shipped are {', '.join(known)}"
            )
        return f"{name}.yaml", recipe_text(name)
    return name, read_file(path)


def _validated(model: type[Model], source: Source, given: dict[Place, str]) -> Model:
    try:
        return model.model_validate(source.data)
    except ValidationError as error:
        raise translated(error, model, source, given) from None


def _override(source: Source, overrides: Sequence[str]) -> dict[Place, str]:
    """Apply ``a.b=c`` texts to the data; returns where each went. Raises RecipeError."""
    given: dict[Place, str] = {}
    for text in overrides:
        path, equals, value = text.partition("=")
        parts = path.split(".")
        if not equals or not all(parts):
            raise RecipeError(f"--set {text}: give a field and its value, such as stages.0.train.steps=100")
        read = _value(text, value)
        place, made = _set(source.data, parts, read.data["value"], text)
        source.quoted = {p for p in source.quoted if p[: len(place)] != place}
        source.quoted |= {(*place, *p[1:]) for p in read.quoted}
        given.pop(made, None)
        given[made] = text
    return dict(reversed(given.items()))  # what was set last answers first for what it holds


def _value(text: str, value: str) -> Source:
    try:
        read = parse(f"value: {value}", "value")
    except RecipeError as error:
        words = re.sub(r"^value(:\d+)?: ", "", str(error))
        hint = " (quote a text that has ': ' in it)" if ": " in value else ""
        raise RecipeError(f"--set {text}: {words}{hint}") from None
    if len(read.data) > 1:
        raise RecipeError(f"--set {text}: one field and its value at a time")
    return read


def _set(root: Any, parts: list[str], value: Any, text: str) -> tuple[Place, Place]:
    """Put ``value`` into ``data``. Returns its place, and the outermost block that was made for it."""
    place: Place = ()
    made: Place = ()
    data = root
    for depth, part in enumerate(parts):
        key: Any = part
        if isinstance(data, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in data]
            if part in names:
                key = names.index(part)
            elif part.isdigit() and int(part) < len(data):
                key = int(part)
            else:
                known = [str(n) for n in names if n]
                raise RecipeError(
                    f"--set {text}: no item {part!r} in {'.'.join(map(str, place))}{meant(part, known)}; "
                    f"there are {', '.join(known) or f'0 to {len(data) - 1}'}"
                )
        elif not isinstance(data, dict):
            raise RecipeError(f"--set {text}: {'.'.join(map(str, place))} is {data!r}, which has no fields")
        place = (*place, key)
        if depth == len(parts) - 1:
            data[key] = value
        elif isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
            made = made or place
        data = data[key]
    return place, made or place
