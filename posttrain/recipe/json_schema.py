"""Makes the JSON Schema of a recipe, by which editors complete and check it while it is written."""

from __future__ import annotations

from typing import Any

from posttrain.recipe.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REWARD = {"type": "string", "description": "A reward's name, or module:function."}
WEIGHT = {"type": "number", "description": "The reward's weight."}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe as it is written in YAML, short forms included.

    Descriptions are the docstrings of the fields. It knows the types of installed plug-ins. It cannot say how
    fields must fit each other: ``posttrain check`` does.
    """
    schema = Recipe.model_json_schema()
    blocks = [schema, *schema["$defs"].values()]
    for block in blocks:
        fields = block.get("properties", {})
        if "rewards" in fields:
            fields["rewards"] = _rewards(fields["rewards"])
        if "oneOf" in fields.get("prompts", {}):  # elsewhere it is a number, or true or false
            fields["prompts"] = _short({"type": "string", "description": "A file's path."}, fields["prompts"])
    _without_titles(schema)
    return {"$schema": DIALECT, **schema, "title": "A recipe of posttrain"}


def _rewards(field: dict[str, Any]) -> dict[str, Any]:
    """The field ``rewards`` with its short forms: a name, a list of names, names with weights or blocks."""
    block = field["items"]
    several = {**field, "items": {"anyOf": [REWARD, block]}}
    outer = {name: several.pop(name) for name in ("description", "default") if name in several}
    named = {
        "type": "object",
        "additionalProperties": {"anyOf": [WEIGHT, {"type": "null"}, {"type": "object"}]},
        "not": {"required": ["type"]},
    }
    return {**outer, "anyOf": [REWARD, several, named, block]}


def _short(form: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    """``field`` that may also be written as ``form``."""
    block = dict(field)
    outer = {name: block.pop(name) for name in ("description", "default") if name in block}
    return {**outer, "anyOf": [form, block]}


def _without_titles(value: Any) -> None:
    """Remove the titles that pydantic makes of names: editors would show them above each description."""
    if isinstance(value, list):
        for item in value:
            _without_titles(item)
    elif isinstance(value, dict):
        if isinstance(value.get("title"), str):
            del value["title"]
        for item in value.values():
            _without_titles(item)
