"""Applies ``a.b=c`` overrides, as ``--set`` gives them, to the data of a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from posttrain.errors import RecipeError
from posttrain.recipe.positions import Source, parse
from posttrain.registry import FieldPath
from posttrain.support.spelling import meant


def apply_overrides(source: Source, overrides: Sequence[str]) -> dict[FieldPath, str]:
    """Change ``source`` as ``overrides`` say. Returns the path of each field or block set -> its override.

    A field is a path of names joined by dots. An item of a list is named by its number (from 0) or by its
    ``name``. The last override comes first in the result, so that it answers for errors in what it set.
    Raises RecipeError if an override has no such form, or names an item or a block that does not exist.
    """
    texts: dict[FieldPath, str] = {}
    for text in overrides:
        field, equals, value = text.partition("=")
        parts = field.split(".")
        if not equals or not all(parts):
            raise RecipeError(f"--set {text}: give a field and its value, such as stages.0.train.steps=100")
        parsed = _parsed(text, value)
        path, outermost = _set(source.data, parts, parsed.data["value"], text)
        source.quoted = {p for p in source.quoted if p[: len(path)] != path}
        source.quoted |= {(*path, *p[1:]) for p in parsed.quoted}
        texts.pop(outermost, None)
        texts[outermost] = text
    return dict(reversed(texts.items()))


def _parsed(text: str, value: str) -> Source:
    """``value`` of the override ``text``, read as YAML, under the key ``value``."""
    try:
        parsed = parse(f"value: {value}", "value")
    except RecipeError as error:
        message = re.sub(r"^value(:\d+)?: ", "", str(error))
        hint = " (quote a text that has ': ' in it)" if ": " in value else ""
        raise RecipeError(f"--set {text}: {message}{hint}") from None
    if len(parsed.data) > 1:
        raise RecipeError(f"--set {text}: one field and its value at a time")
    return parsed


def _set(data: Any, parts: list[str], value: Any, text: str) -> tuple[FieldPath, FieldPath]:
    """Put ``value`` into ``data`` at ``parts``, and make the blocks on the way that are missing.

    Returns the path of the value, and the path of the outermost block that was made, or else of the value.
    """
    path: FieldPath = ()
    outermost: FieldPath = ()
    for depth, part in enumerate(parts):
        key = _key(data, part, path, text)
        path = (*path, key)
        if depth == len(parts) - 1:
            data[key] = value
        elif isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
            outermost = outermost or path
        data = data[key]
    return path, outermost or path


def _key(data: Any, part: str, path: FieldPath, text: str) -> Any:
    """The key or index that ``part`` stands for in ``data``, which is the block or list at ``path``."""
    field = ".".join(map(str, path))
    if isinstance(data, dict):
        return part
    if not isinstance(data, list):
        raise RecipeError(f"--set {text}: {field} is {data!r}, which has no fields")
    names = [item.get("name") if isinstance(item, dict) else None for item in data]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(data):
        return int(part)
    known = [str(name) for name in names if name]
    raise RecipeError(
        f"--set {text}: no item {part!r} in {field}{meant(part, known)}; "
        f"there are {', '.join(known) or f'0 to {len(data) - 1}'}"
    )
