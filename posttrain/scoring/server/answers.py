"""Writes scores as the JSON that answers a request to a reward server, and reads them.

The numbers have enough digits to give each float32 exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.reward import Scores
from posttrain.support.wording import SHOWN_CHARACTERS, shown

MAX_DETAILS = 100
"""Most details in an answer."""


def answer(scores: Scores) -> dict[str, Any]:
    """The JSON object that answers a request."""
    return {
        "value": scores.value.float().tolist(),
        "details": {name: values.float().tolist() for name, values in scores.details.items()},
    }


def scores_of(data: Any, count: int) -> Scores:
    """The scores in ``data``, an answer for ``count`` images; they need not be finite. Raises ValueError if
    it is malformed."""
    if not isinstance(data, dict) or not isinstance(data.get("value"), list):
        raise ValueError("no list 'value' of scores")
    details = data.get("details", {})
    if not isinstance(details, dict):
        raise ValueError("'details' is not an object")
    if len(details) > MAX_DETAILS:
        raise ValueError(f"{len(details)} details; at most {MAX_DETAILS} are taken")
    if odd := [name for name in details if not name.isprintable() or len(name) > SHOWN_CHARACTERS]:
        raise ValueError(f"a detail has the name {shown(odd[0])}")
    return Scores(
        _tensor("value", data["value"], count),
        {name: _tensor(f"details.{name}", values, count) for name, values in details.items()},
    )


def not_finite(data: Any, count: int) -> list[int]:
    """Which of ``count`` images have no finite score, as the refusal ``data`` says; none if it says nothing
    of it."""
    places = data.get("not_finite") if isinstance(data, dict) else None
    if not isinstance(places, list):
        return []
    return places if all(type(place) is int and 0 <= place < count for place in places) else []


def _tensor(name: str, values: Any, count: int) -> Tensor:
    if not isinstance(values, list) or len(values) != count:
        given = f"{len(values)} numbers" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"{name}: {given} for {count} images")
    # bool is refused although Python counts it as an int: no reward server sends it
    if bad := [v for v in values if not isinstance(v, (int, float)) or isinstance(v, bool)]:
        raise ValueError(f"{name}: {shown(bad[0])} is no number")
    try:
        return torch.tensor([float(v) for v in values], dtype=torch.float32)
    except OverflowError as error:
        raise ValueError(f"{name}: {error}") from error
