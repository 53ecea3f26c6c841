"""Writes docs/reference-python.md: what the pages name as public in Python, with signatures and docstrings."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from words import NOTE, markdown, one_line, table, wrapped

from posttrain.distributed.world import World

HEAD = f"""{NOTE}
# Python interface

What [From Python](python.md) and [Plug-ins](plugins.md) call public: the names of `posttrain` itself, the interfaces that a class
of your own implements, and what these hand to it. Fields of a recipe's blocks are in [Recipe fields](reference-recipe.md). Shapes
stand in brackets: (n, c, h, w). Other modules are described by their docstrings alone.
"""
PARTS: dict[str, tuple[str, list[str]]] = {
    "posttrain": (
        "Run a recipe and read its results.",
        ["run", "open_run", "load_recipe", "RunResult", "Recipe", "Stage", "Train", "Evaluation"],
    ),
    "posttrain.algorithm": (
        "The interface of an [algorithm](plugin-algorithm.md).",
        ["Algorithm", "Batch", "Items", "Losses", "Tools", "Judge", "Verdict"],
    ),
    "posttrain.policy": ("The trained model that an algorithm calls.", ["Policy"]),
    "posttrain.support.randomness": ("Random numbers as [functions of a key](concept-randomness.md).", ["Draws"]),
    "posttrain.condition": ("Encoded prompts.", ["Conditions"]),
    "posttrain.flow": (
        "The mathematics of [rectified flow](concept-flow.md).",
        ["interpolate", "predicted_x0", "shift_sigma", "guided", "stochastic_step", "log_prob", "expand"],
    ),
    "posttrain.sampling.prompts": ("", ["encode"]),
    "posttrain.sampling.latents": ("", ["sample_latents"]),
    "posttrain.reward": ("The interface of a [reward](plugin-reward.md).", ["Reward", "Scores"]),
    "posttrain.model": ("The interface of a [model](plugin-model.md).", ["Model", "FlowModel"]),
    "posttrain.data.family": ("The interface of a [data source](plugin-data.md).", ["Data", "Opening", "Facts"]),
    "posttrain.data.source": ("", ["BatchSource"]),
    "posttrain.data.image_data": ("", ["ImageFiles"]),
    "posttrain.data.pair_data": ("", ["PairFiles"]),
    "posttrain.testing": (
        "The [laws](plugins.md#the-laws) as classes of tests.",
        ["AlgorithmLaws", "RewardLaws", "ModelLaws", "DataLaws", "LawBroken"],
    ),
    "posttrain.errors": (
        "What posttrain raises. Each class is also the built-in exception that its bases name.",
        ["PosttrainError", "RecipeError", "DataError", "ModelError", "TrainingError", "AlgorithmError", "RewardError",
         "NotFinite", "StepRefused", "DamagedError", "InstallError", "UserCodeError"],
    ),
}  # fmt: skip
FIELDS = {"Recipe": "top-level", "Stage": "stages", "Train": "stages-train", "Evaluation": "evaluation"}
"""Blocks of a recipe, whose arguments another page lists: the heading there."""
CHOSEN = {"Policy": ("velocity", "guided_velocity", "condition", "using", "move_role")}
"""Of a class that the engine uses too, what an algorithm calls."""
BRIEF = ("posttrain.errors", "posttrain.testing")
"""Modules whose classes are a row of a table each."""


def page() -> str:
    """The whole page."""
    return "\n\n".join([wrapped(HEAD), *_parts()]).rstrip() + "\n"


def _parts() -> Iterator[str]:
    for name, (words, members) in PARTS.items():
        module = importlib.import_module(name)
        yield f"## `{name}`"
        if words:
            yield words
        found = {member: getattr(module, member) for member in members}
        if name in BRIEF:
            yield table(("class", "bases", "what it is"), [_brief(m, o) for m, o in found.items()]).rstrip()
            continue
        for member, thing in found.items():
            yield from _class(member, thing) if inspect.isclass(thing) else _function(member, thing, 3)


def _brief(name: str, kind: type) -> tuple[str, ...]:
    bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__ if base is not object)
    return f"`{name}`", bases, one_line(inspect.getdoc(kind)).split(". ")[0].rstrip(".") + "."


def _class(name: str, kind: type) -> Iterator[str]:
    yield f"### `{name}`"
    if dataclasses.is_dataclass(kind) or name in CHOSEN:
        yield f"```text\n{_signature(name, kind)}\n```"
    yield wrapped(markdown(kind.__doc__))
    if name in FIELDS:
        yield f"Its arguments are [the fields of the block](reference-recipe.md#{FIELDS[name]}), by name."
        return
    rows = [(f"`{n}`", _type_cell(t), one_line(d)) for n, t, d in _attributes(kind)]
    if rows:
        yield table(("attribute", "type", "meaning"), rows).rstrip()
    for member, thing in _methods(kind):
        if name not in CHOSEN or member in CHOSEN[name]:
            yield from _function(f"{name}.{member}", thing, 4)


def _type_cell(annotation: str) -> str:
    """A type in code; a bar would end the cell."""
    if "|" in re.sub(r"\[.*\]", "", annotation):
        return " or ".join(f"`{part.strip()}`" for part in re.split(r" \| (?![^[]*\])", annotation))
    return f"`{annotation}`" if annotation else ""


def _attributes(kind: type) -> Iterator[tuple[str, str, str]]:
    """The documented attributes and properties of ``kind``: name, type and meaning."""
    lines = textwrap.dedent(inspect.getsource(kind))
    body = re.compile(r'^    (?:self\.)?(\w+)(?:: ([^=\n]+?))?(?: = ([^\n]*))?\n    """(.*?)"""', re.M | re.S)
    for name, type_, _, words in body.findall(lines):
        if not name.startswith("_"):
            yield name, _plain(type_), words
    for name, member in vars(kind).items():
        if isinstance(member, property | cached_property) and not name.startswith("_"):
            function = member.fget if isinstance(member, property) else member.func
            assert function is not None, "every property of posttrain can be read"
            yield name, _plain(inspect.signature(function).return_annotation), function.__doc__ or ""


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(kind).items():
        function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if inspect.isfunction(function) and not name.startswith("_") and function.__doc__:
            yield name, function


def _function(name: str, function: Any, level: int) -> Iterator[str]:
    yield f"{'#' * level} `{name}`"
    kept = inspect.unwrap(function)
    if getattr(kept, "__isabstractmethod__", False):
        yield "*Abstract: a class of your own writes it.*"
    yield f"```text\n{_signature(name.rpartition('.')[2], kept)}\n```"
    yield wrapped(markdown(function.__doc__))


def _signature(name: str, function: Any) -> str:
    """The call as the source has it, in lines if it is long."""
    found = inspect.signature(function)
    words, keyword_only = [], False
    for part in found.parameters.values():
        if part.name == "self":
            continue
        if part.kind is part.KEYWORD_ONLY and not keyword_only:
            words, keyword_only = [*words, "*"], True
        words.append(_parameter(part))
    returned = "" if inspect.isclass(function) else _plain(found.return_annotation)
    end = f" -> {returned}" if returned else ""
    line = f"{name}({', '.join(words)}){end}"
    return line if len(line) <= 110 else "\n".join([f"{name}(", *(f"    {w}," for w in words), f"){end}"])


def _parameter(part: inspect.Parameter) -> str:
    type_ = _plain(part.annotation)
    words = f"{part.name}: {type_}" if type_ else part.name
    if part.default is part.empty:
        return words
    made = "factory" in type(part.default).__name__.lower() or repr(part.default).startswith("<")
    shown = "..." if made or isinstance(part.default, World) else repr(part.default)
    return f"{words} = {shown}" if type_ else f"{words}={shown}"


def _plain(annotation: Any) -> str:
    """An annotation as the source has it, without ClassVar and marks; "" if there is none."""
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"ClassVar\[(.*)\]$", r"\1", text.strip().strip("'"))
    return re.sub(r"Annotated\[(.*), [A-Z]+\]$", r"\1", text)
