"""Checks commands of posttrain that a page shows, without running them: options, values, recipes, fields."""

import functools
from typing import get_args

import typer.main
from page_scripts import LAUNCHERS, is_placeholder, launcher_problems, near, program_problems
from ruamel.yaml import YAML

from posttrain.cli.app import app
from posttrain.errors import PosttrainError
from posttrain.flow.solvers import Solver
from posttrain.model import DtypeName
from posttrain.planning.gpus import gpu
from posttrain.recipe.evaluation_block import Scoring
from posttrain.recipe.file import evaluation_settings, load_recipe, parse_recipe, recipe_text, shipped_recipes
from posttrain.recipe.suites import SUITES
from posttrain.reward import Reward
from posttrain.shapes.scene import STYLES
from posttrain.stages.export import Format

CHOICES = {
    ("export", "format"): get_args(Format), ("export", "dtype"): get_args(DtypeName),
    ("eval", "suite"): tuple(SUITES), ("eval", "weights"): ("ema", "raw"), ("sample", "solver"): get_args(Solver),
    ("shapes build", "style"): tuple(STYLES),
}  # fmt: skip
"""Values that a command checks itself, when it is run."""


@functools.cache
def _root():
    return typer.main.get_command(app)


class Checker:
    """Checks the commands of one page. It remembers the recipes that the page has copied or shown."""

    def __init__(self):
        self.recipes: dict[str, str] = {}
        """File -> its text."""

    def problems(self, words, *, inline=False) -> list[str]:
        """What is wrong with the command ``words``. ``inline`` code may leave out what is required."""
        program = words[0].rsplit("/", 1)[-1]
        if program == "posttrain":
            return self._of_posttrain(words[1:], inline)
        if "-m" in words[:-1] and words[words.index("-m") + 1] == "posttrain":
            at = words.index("-m")
            return launcher_problems(words[:at]) + self._of_posttrain(words[at + 2 :], inline)
        if program in LAUNCHERS and "posttrain" in words:
            return self._of_posttrain(words[words.index("posttrain") + 1 :], inline)
        return program_problems(words)

    def _of_posttrain(self, words, inline):
        command, path, context = _root(), [], None
        while True:
            context = command.context_class(
                command, info_name=path[-1] if path else "posttrain", parent=context
            )
            if not hasattr(command, "commands") or not words or words[0].startswith("-"):
                break
            if is_placeholder(words[0]):
                return []
            if words[0] not in command.commands:
                return [f"no command {words[0]!r}{near(words[0], command.commands)}"]
            command, path, words = command.commands[words[0]], [*path, words[0]], words[1:]
        try:
            given, left, _ = command.make_parser(context).parse_args(list(words))
        except Exception as error:  # typer has its own copy of click's classes
            return [_said(error)]
        found = [f"too many arguments: {' '.join(left)}"] if left and not hasattr(command, "commands") else []
        if {"--help", "-h", "--version"} & set(words):
            return found
        values = {}
        for parameter in command.params:
            value = given.get(parameter.name)
            shown = value if isinstance(value, list | tuple) else [value]
            if any(is_placeholder(str(part)) for part in shown if part is not None):
                continue
            try:
                parameter.handle_parse_result(context, given, [])
            except Exception as error:
                if not (inline and "missing" in type(error).__name__.lower()):
                    found.append(_said(error))
                continue
            if value is not None:
                values[parameter.name] = value
        command_name = " ".join(path)
        for name, value in values.items():
            if value not in (allowed := CHOICES.get((command_name, name), (value,))):
                found.append(f"--{name}: {value!r} is none of {', '.join(allowed)}")
        try:
            self._meaning(command_name, values)
        except PosttrainError as error:
            found.append(str(error))
        return found

    def _meaning(self, command, values):
        """Raise PosttrainError if recipes, fields, rewards or GPUs that a command names do not exist."""
        fields = [text for text in values.get("overrides") or () if not is_placeholder(text)]
        for place in ("recipe", "like"):
            if named := values.get(place):
                self._recipe(named, fields if place == "recipe" else [])
        if command == "recipes show":
            recipe_text(values.get("name", "quickstart"))
        if command == "recipes copy" and "name" in values:
            text = recipe_text(values["name"])
            self.recipes[str(values.get("target") or f"{values['name']}.yaml")] = text
        if command == "plan" and "gpu" in values:
            gpu(values["gpu"])
        if command == "eval" and fields:
            start = {"prompts": {"type": "shapes", "count": 1}, "rewards": ["shapes"]}
            evaluation_settings(None, None, None, (), fields, start)
        if command == "rewards fetch" or command == "serve-reward":
            _rewards(
                [values["name"]] if "name" in values else [], fields if command == "serve-reward" else []
            )
        elif command in ("score", "eval"):
            _rewards(values.get("reward") or [], fields if command == "score" else [])

    def _recipe(self, named, fields):
        if text := self.recipes.get(named) or self.recipes.get(f"{named}.yaml"):
            parse_recipe(text, named, fields, checks=False)
        elif (stem := named.rsplit("/", 1)[-1].removesuffix(".yaml")) in shipped_recipes():
            load_recipe(stem, fields, checks=False)
        elif "/" not in named and not named.endswith((".yaml", ".yml")):
            load_recipe(named, checks=False)  # raises: it is not shipped
        elif fields:
            refused = [_refused(recipe, fields) for recipe in shipped_recipes()]
            if all(refused):  # a recipe of the reader's own: fields of some shipped recipe will do
                raise PosttrainError(f"no shipped recipe takes --set {' '.join(fields)}: {refused[0]}")


def _refused(recipe, fields):
    try:
        load_recipe(recipe, fields, checks=False)
    except PosttrainError as error:
        return str(error)
    return None


def _rewards(names, fields):
    if not names:
        return
    blocks = []
    for name in names:
        if ":" in name or is_placeholder(name):
            return
        if name not in Reward.variants:
            raise PosttrainError(f"no reward {name!r}{near(name, Reward.variants)}")
        blocks.append({"type": name})
    for text in fields:
        key, _, value = text.partition("=")
        owner, dot, rest = key.partition(".")
        block = blocks[names.index(owner)] if dot and owner in names else blocks[0]
        block[rest if dot and owner in names else key] = YAML(typ="safe").load(value)
    try:
        Scoring(rewards=blocks)
    except PosttrainError as error:
        if lines := [x for x in str(error).splitlines() if not x.endswith("missing, and it has no default")]:
            raise PosttrainError("\n".join(lines)) from None


def _said(error):
    return error.format_message() if hasattr(error, "format_message") else f"{type(error).__name__}: {error}"
