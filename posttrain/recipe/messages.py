"""Turns validation errors into messages with file, line, field, value found and values allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe.positions import Source
from posttrain.registry import FAMILIES, FIELD_ERROR, FieldPath, Named, tell_errors_with
from posttrain.support.plugins import missing_type
from posttrain.support.spelling import meant

SHOWN_PROBLEMS = 20
SCALARS = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
}
"""Pydantic's error types for scalars -> what a recipe's author should write."""
COLLECTIONS = {
    "model_type": "a block of fields",
    "model_attributes_type": "a block of fields",
    "dict_type": "a block of fields",
    "list_type": "a list",
}

FieldProblem = tuple[FieldPath, str]
"""A field's path in the recipe, and what is wrong with it."""


def translated(
    error: ValidationError, root: type[BaseModel], source: Source, overrides: Mapping[FieldPath, str]
) -> RecipeError:
    """The RecipeError with all problems of ``error``, in the order of their lines.

    ``root`` is the class that was validated. ``overrides`` maps each field that an override set to the
    override's text.
    """
    problems = []
    for entry in error.errors(include_url=False):
        path, owner = _located(entry["loc"], root, source.data)
        message = _explained(dict(entry), path, owner, source)
        if entry["type"] == "union_tag_invalid":
            path = (*path, "type")
        elif entry["type"] == FIELD_ERROR:
            path = (*path, *entry.get("ctx", {})["path"])
        problems.append((path, message))
    return listed(problems, source, overrides)


def _of_python(error: ValidationError, root: type[BaseModel], fields: Mapping[str, Any]) -> RecipeError:
    """As :func:`translated`, for a block that is made in Python, which has no lines."""
    return translated(error, root, Source(root.__name__, dict(fields)), {})


tell_errors_with(_of_python)


def listed(
    problems: Sequence[FieldProblem], source: Source, overrides: Mapping[FieldPath, str]
) -> RecipeError:
    """One RecipeError that lists ``problems`` in the order of their lines, those of overrides first."""
    rows = []
    for path, message in problems:
        file_path = _in_file(path, source.data)
        override = next((text for p, text in overrides.items() if file_path[: len(p)] == p), None)
        line = 0 if override else source.line(file_path)
        where = f"--set {override}" if override else source.place(file_path)
        field = ".".join(map(str, path)) + _stage_name(path, source.data)
        rows.append((line, f"{where}: {field + ': ' if path else ''}{message}"))
    rows = list(dict.fromkeys(sorted(rows, key=lambda row: row[0])))
    lines = [text for _, text in rows[:SHOWN_PROBLEMS]]
    if len(rows) > SHOWN_PROBLEMS:
        lines.append(f"... and {len(rows) - SHOWN_PROBLEMS} more")
    return RecipeError("\n".join(lines))


def _located(
    loc: Sequence[str | int], root: type[BaseModel], data: Any
) -> tuple[FieldPath, type[BaseModel] | None]:
    """The field path that pydantic's ``loc`` means (without union tags), and the class that has the field."""
    path: FieldPath = ()
    classes, owner = [root], root
    for part in loc:
        if isinstance(part, int):
            path = (*path, part)
            continue
        tagged = [c for c in classes if part in _types(c)]
        with_field = [c for c in classes if part in c.model_fields]
        if tagged and not (len(classes) == 1 and with_field):
            classes, owner = tagged, tagged[0]
            continue
        path = (*path, part)
        if with_field:
            owner = with_field[0] if len(classes) == 1 else None
            classes = _classes(with_field[0].model_fields[part].annotation)
        elif len(classes) == 1:
            owner = classes[0]
    return path, owner


def _types(spec: type[BaseModel]) -> tuple[str, ...]:
    """The values that ``spec`` allows for the field that tells it from other specs."""
    field = spec.model_fields.get("type") or spec.model_fields.get("strategy")
    return get_args(field.annotation) if field else ()


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """The specs that a field's annotation allows; a family stands for its variants."""
    if isinstance(annotation, type) and issubclass(annotation, Named) and Named in annotation.__bases__:
        return [*annotation.variants.values()]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [spec for argument in get_args(annotation) for spec in _classes(argument)]


def _explained(entry: dict[str, Any], path: FieldPath, owner: type[BaseModel] | None, source: Source) -> str:
    """What is wrong and what is allowed, for one ``entry`` of pydantic's errors."""
    kind, value, context = entry["type"], entry.get("input"), entry.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_field(path, owner)
    if kind == "missing":
        return "missing, and it has no default"
    if kind == FIELD_ERROR:
        return context["message"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_invalid":
        allowed = sorted(re.findall(r"'([^']*)'", str(context["expected_tags"])))
        hint, plugins = meant(context["tag"], allowed), from_plugins(context["tag"], allowed)
        return f"no type {context['tag']!r}{hint}; one of {', '.join(allowed)}{plugins}"
    if kind == "union_tag_not_found":
        return "is empty" if value is None else _no_type(path, owner)
    if value is None:
        return "is empty; give it a value or remove it"
    if kind == "literal_error":
        found = re.findall(r"'([^']*)'|([\w.-]+)", str(context["expected"]))
        allowed = [text or bare for text, bare in found if text or bare not in ("", "or")]
        return f"{value!r} is not allowed{meant(str(value), allowed)}; one of {', '.join(allowed)}"
    if (expected := SCALARS.get(kind) or COLLECTIONS.get(kind)) is not None:
        return f"expected {expected}, found {_shown(value, path, source)}{_block_of(value, path, owner)}"
    field = owner.model_fields.get(str(path[-1])) if owner and path else None
    if kind == "string_pattern_mismatch" and field and field.examples:
        return f"{_shown(value, path, source)} has not the form of {field.examples[0]!r}"
    message = entry["msg"]
    return f"{message[:1].lower()}{message[1:]} (found {_shown(value, path, source)})"


def from_plugins(name: str, allowed: Sequence[str]) -> str:
    """What failed plug-ins have to do with the type ``name`` of the family that has the types ``allowed``."""
    groups = (group for group, family in FAMILIES.items() if {*allowed} and {*allowed} <= {*family.variants})
    return "".join(missing_type(group, name) for group in groups)


def _unknown_field(path: FieldPath, owner: type[BaseModel] | None) -> str:
    fields = list(owner.model_fields) if owner else []
    name = next(iter(_types(owner)), owner.__name__.lower()) if owner else "this block"
    variants = owner.variants.items() if owner and issubclass(owner, Named) else ()
    others = [other for other, spec in variants if path[-1] in spec.model_fields]
    elsewhere = f" ({', '.join(others)} has it)" if others and not meant(path[-1], fields) else ""
    return f"no such field{meant(path[-1], fields)}; {name} has {', '.join(fields)}{elsewhere}"


def _no_type(path: FieldPath, owner: type[BaseModel] | None) -> str:
    name = next((str(part) for part in reversed(path) if isinstance(part, str)), "")
    field = owner.model_fields.get(name) if owner else None
    types = sorted(t for spec in _classes(field.annotation) for t in _types(spec)) if field else []
    return f"it has no 'type'; one of {', '.join(types)}" if types else "it has no 'type'"


def _block_of(value: Any, path: FieldPath, owner: type[BaseModel] | None) -> str:
    """How to write a block of which only the type is given; empty if ``value`` is no type of the field's."""
    field = owner.model_fields.get(str(path[-1])) if owner and path else None
    types = [t for spec in _classes(field.annotation) for t in _types(spec)] if field else []
    return f": write {{type: {value}}}" if isinstance(value, str) and value in types else ""


def _shown(value: Any, path: FieldPath, source: Source) -> str:
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, str):
        if _in_file(path, source.data) in source.quoted and re.fullmatch(r"[-+.\deE]+", value):
            return f"the text {value!r} in quotes: remove the quotes"
        return f"the text {value if len(value) <= 80 else value[:77] + '...'!r}"
    if isinstance(value, Mapping):
        return f"a block of fields ({', '.join(map(str, value))})" if value else "an empty block"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _in_file(path: FieldPath, data: Any) -> FieldPath:
    """The part of ``path`` that the file has; a mapping of names may stand for the schema's list."""
    in_file: FieldPath = ()
    for part in path:
        if isinstance(data, Mapping) and isinstance(part, int):
            if part >= len(data):
                break
            part = list(data)[part]
        if (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            in_file, data = (*in_file, part), cast(Any, data)[part]
        else:
            break
    return in_file


def _stage_name(path: FieldPath, data: Any) -> str:
    """`` (stage 'x')`` if ``path`` is inside a named stage, otherwise nothing."""
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int):
        stages = data.get("stages")
        if isinstance(stages, list) and path[1] < len(stages) and isinstance(stages[path[1]], Mapping):
            name = stages[path[1]].get("name")
            return f" (stage {name!r})" if isinstance(name, str) else ""
    return ""
