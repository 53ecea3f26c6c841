"""The field types that several blocks of a recipe share: names, and any variant of a family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from posttrain.algorithm import Algorithm
from posttrain.data.family import Data
from posttrain.model import Model
from posttrain.recipe.any_of import AnyOf
from posttrain.registry import field_error
from posttrain.reward import Reward


def with_type(block: Any) -> Any:
    """``block``, of ``data``, with the ``type`` that its keys imply, if it has none. Others are unchanged."""
    if not isinstance(block, dict) or "type" in block:
        return block
    for name in ("images", "pairs"):
        if isinstance(block.get(name), str | Path):
            return {"type": name, **block}
    return {"type": "prompts", **block} if "prompts" in block else block


if TYPE_CHECKING:
    AnyAlgorithm = Algorithm
    AnyData = Data
    AnyModel = Model
    AnyReward = Reward
else:
    AnyAlgorithm = Annotated[Algorithm, AnyOf(Algorithm, "posttrain.algorithms")]
    AnyData = Annotated[Data, AnyOf(Data, "posttrain.data"), BeforeValidator(with_type)]
    AnyModel = Annotated[Model, AnyOf(Model, "posttrain.models")]
    AnyReward = Annotated[Reward, AnyOf(Reward, "posttrain.rewards")]

NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?"


def _check_name(name: object) -> object:
    """Raise ValueError, which says in words what the pattern allows."""
    if isinstance(name, str) and not re.fullmatch(NAME, name):
        raise ValueError(
            f"{name!r} is no name: letters A to Z, digits, '.', '-' and '_' are allowed, "
            "a letter or digit first, no '.' last"
        )
    return name


Name = Annotated[str, Field(pattern=f"^{NAME}$", max_length=80), BeforeValidator(_check_name)]
"""A name that is also a folder's name: at most 80 letters, digits, dots, dashes and underscores. It ends in
no dot, which Windows would leave out."""


def check_rewards_differ(rewards: list[Reward]) -> None:
    """Raise the error of the field ``rewards`` if two rewards have one label: their scores would collide."""
    labels = [reward.label for reward in rewards]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise field_error(("rewards",), f"{', '.join(sorted(repeated))} is given twice")
