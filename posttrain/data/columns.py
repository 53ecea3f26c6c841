"""Reads the columns of a row: its caption, its size, its weight, and the others, which are kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from posttrain.data.lines import string
from posttrain.data.table import Bucket

CAPTIONS = ("caption", "text", "caption_en", "prompt", "description")
"""Columns in which a caption is looked for, in this order, where the recipe names none."""

CAPTION_KEYS = ("long", "medium", "short", "text")
"""The keys of a caption that is a JSON object; the first one with text is used."""

SIZE = ("bw", "bh")
"""The columns of the size at which an image is trained, in pixels."""
WEIGHT = "weight"
"""The column of an image's weight."""
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6


def caption_column(names: Iterable[str], given: str | None) -> str:
    """The column of the captions among ``names``: the ``given`` one, or the first of CAPTIONS.

    Raises ValueError if there is none.
    """
    names = list(names)
    if given is not None:
        if given not in names:
            raise ValueError(f"no column {given!r}, which caption_column names (found: {listed(names)})")
        return given
    found = next((name for name in CAPTIONS if name in names), None)
    if found is None:
        raise ValueError(
            f"no column of captions: none of {listed(CAPTIONS)} (found: {listed(names)}); name it by "
            "caption_column"
        )
    return found


def listed(names: Iterable[str]) -> str:
    """The names in quotes, for a message."""
    return ", ".join(repr(name[:60]) for name in names) or "nothing"


def caption_of(row: Mapping[str, Any], key: str) -> str:
    """The caption in the column ``key``: text, or the first text of an object with CAPTION_KEYS.

    Raises ValueError if there is none.
    """
    value = row.get(key)
    if isinstance(value, str) and re.match(r"\s*\{\s*[\"'}]", value):
        # The text is meant as JSON, so it must not be trained on as a caption.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'{key}' starts like a JSON object but is none: {error}") from error
    if not isinstance(value, dict):
        return string(dict(row), key)
    for name in CAPTION_KEYS:
        if isinstance(value.get(name), str) and value[name].strip():
            return string(value, name)
    raise ValueError(f"'{key}' is an object without text under any of {', '.join(CAPTION_KEYS)}")


def bucket_of(row: Mapping[str, Any]) -> Bucket | None:
    """The size that the row names; None if it names none. Raises ValueError for anything but two sides."""
    if row.get("bw") is None and row.get("bh") is None:
        return None
    for key in SIZE:
        if type(row.get(key)) is not int or row[key] <= 0:
            value = json.dumps(row.get(key), default=str)[:60]
            raise ValueError(f"'{key}' must be a positive whole number, not {value}")
    return row["bw"], row["bh"]


def extra_of(row: Mapping[str, Any], used: Collection[str]) -> dict[str, Any]:
    """The columns that are not ``used``. Raises ValueError if the weight is no number in its range."""
    extra = {name: value for name, value in row.items() if name not in used and name not in SIZE}
    if (weight := extra.get(WEIGHT)) is None:
        extra.pop(WEIGHT, None)
        return extra
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not math.isfinite(weight)
        or not LEAST_WEIGHT <= weight <= LARGEST_WEIGHT
    ):
        raise ValueError(
            f"'{WEIGHT}' must be a number from {LEAST_WEIGHT:g} to {LARGEST_WEIGHT:g}, not "
            f"{json.dumps(weight, default=str)[:60]}; remove a row to leave its image out"
        )
    return extra
