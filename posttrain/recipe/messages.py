"""What is wrong with a recipe, in the words of its file: line, field, value found, values allowed?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe.positions import Place, Source
from posttrain.registry import AT
from posttrain.support.spelling import meant

MOST_SHOWN = 20
SCALARS = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
}
BLOCKS = ("model_type", "model_attributes_type", "dict_type")


def translated(
    error: ValidationError, root: type[BaseModel], source: Source, overrides: Mapping[Place, str]
) -> RecipeError:
    """The RecipeError that tells all of ``error``'s problems, by line."""
    problems = []
    for entry in error.errors(include_url=False):
        place, owner = _located(entry["loc"], root, source.data)
        words = _told(dict(entry), place, owner, source)
        at = (*place, "type") if entry["type"] == "union_tag_invalid" else place
        if entry["type"] == AT:
            at = (*place, *entry.get("ctx", {})["place"])
        problems.append((at, words))
    return listed(problems, source, overrides)


def listed(
    problems: Sequence[tuple[Place, str]], source: Source, overrides: Mapping[Place, str]
) -> RecipeError:
    """One RecipeError for (place, words) pairs."""
    rows = []
    for place, words in problems:
        raw = _raw(place, source.data)
        given = next((text for at, text in overrides.items() if raw[: len(at)] == at), None)
        line = 0 if given else source.line(raw)
        where = f"--set {given}" if given else f"{source.name}:{line}"
        path = ".".join(str(part) for part in place)
        rows.append((line, f"{where}: {path + _stage(place, source.data) + ': ' if path else ''}{words}"))
    rows = list(dict.fromkeys(sorted(rows, key=lambda row: row[0])))
    lines = [text for _, text in rows[:MOST_SHOWN]]
    if len(rows) > MOST_SHOWN:
        lines.append(f"... and {len(rows) - MOST_SHOWN} more")
    return RecipeError("\n".join(lines))


def _located(
    loc: Sequence[str | int], root: type[BaseModel], data: Any
) -> tuple[Place, type[BaseModel] | None]:
    """The place in the file that pydantic's ``loc`` means (union tags left out), and the class around it."""
    place: Place = ()
    classes, owner = [root], root
    for part in loc:
        if isinstance(part, int):
            place = (*place, part)
            continue
        tagged = [c for c in classes if part in _types(c)]
        known = [c for c in classes if part in c.model_fields]
        if tagged and not (len(classes) == 1 and known):
            classes, owner = tagged, tagged[0]
            continue
        place = (*place, part)
        if known:
            owner = known[0] if len(classes) == 1 else None
            classes = _classes(known[0].model_fields[part].annotation)
        elif len(classes) == 1:
            owner = classes[0]
    return place, owner


def _types(spec: type[BaseModel]) -> tuple[str, ...]:
    field = spec.model_fields.get("type")
    return get_args(field.annotation) if field else ()


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """The specs that a field's annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _classes(argument)]


def _told(entry: dict[str, Any], place: Place, owner: type[BaseModel] | None, source: Source) -> str:
    kind, found, context = entry["type"], entry.get("input"), entry.get("ctx", {})
    if kind == "extra_forbidden":
        fields = list(owner.model_fields) if owner else []
        name = next(iter(_types(owner)), owner.__name__.lower()) if owner else "this block"
        return f"no such field{meant(place[-1], fields)}; {name} has {', '.join(fields)}"
    if kind == "missing":
        return "missing, and it has no default"
    if kind == "union_tag_invalid":
        allowed = sorted(re.findall(r"'([^']*)'", str(context["expected_tags"])))
        return f"no type {context['tag']!r}{meant(context['tag'], allowed)}; one of {', '.join(allowed)}"
    if found is None and kind not in ("value_error", "union_tag_not_found"):
        return "is empty; give it a value or remove it"
    if kind == "union_tag_not_found":
        if found is None:
            return "is empty"
        field = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
        known = owner.model_fields.get(field) if owner else None
        types = sorted(t for c in _classes(known.annotation) for t in _types(c)) if known else []
        return f"it has no 'type'; one of {', '.join(types)}" if types else "it has no 'type'"
    if kind == "literal_error":
        allowed = re.findall(r"[\w.-]+", str(context["expected"]).replace(" or ", " "))
        return f"{found!r} is not allowed{meant(str(found), allowed)}; one of {', '.join(allowed)}"
    if kind in SCALARS:
        return f"expected {SCALARS[kind]}, found {_shown(found, place, source)}"
    if kind in BLOCKS or kind == "list_type":
        expected = "a list" if kind == "list_type" else "a block of fields"
        return f"expected {expected}, found {_shown(found, place, source)}"
    if kind == AT:
        return context["words"]
    if kind == "value_error":
        return str(context["error"])
    return f"{_lower(entry['msg'])} (found {_shown(found, place, source)})"


def _shown(value: Any, place: Place, source: Source) -> str:
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, str):
        if _raw(place, source.data) in source.quoted and re.fullmatch(r"[-+.\deE]+", value):
            return f"the text {value!r} in quotes: remove the quotes"
        return f"the text {value if len(value) <= 80 else value[:77] + '...'!r}"
    if isinstance(value, Mapping):
        return f"a block of fields ({', '.join(map(str, value))})" if value else "an empty block"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return repr(value)


def _raw(place: Place, data: Any) -> Place:
    """``place`` in the file, where a mapping of names may stand for the schema's list."""
    found: Place = ()
    for part in place:
        if isinstance(data, Mapping) and isinstance(part, int):
            if part >= len(data):
                break
            part = list(data)[part]
        if (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            found, data = (*found, part), cast(Any, data)[part]
        else:
            break
    return found


def _stage(place: Place, data: Any) -> str:
    """`` (stage 'x')`` where ``place`` is inside a named stage."""
    if len(place) > 1 and place[0] == "stages" and isinstance(place[1], int):
        stages = data.get("stages")
        if isinstance(stages, list) and place[1] < len(stages) and isinstance(stages[place[1]], Mapping):
            name = stages[place[1]].get("name")
            return f" (stage {name!r})" if isinstance(name, str) else ""
    return ""


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
