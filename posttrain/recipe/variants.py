"""The field types that several blocks of a recipe share: names, and the installed variants of a family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from posttrain.algorithm import Algorithm
from posttrain.model import Model
from posttrain.registry import field_error, union
from posttrain.reward import Reward

if TYPE_CHECKING:
    AnyAlgorithm = Algorithm
    AnyModel = Model
    AnyReward = Reward
else:
    AnyAlgorithm = union(Algorithm, "posttrain.algorithms")
    AnyModel = union(Model, "posttrain.models")
    AnyReward = union(Reward, "posttrain.rewards")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
"""A name that is also a folder's name: at most 80 letters, digits, dots, dashes and underscores."""


def check_rewards_differ(rewards: list[Reward]) -> None:
    """Raise the error of the field ``rewards`` if two rewards have one label: their scores would collide."""
    labels = [reward.label for reward in rewards]
    if repeated := {label for label in labels if labels.count(label) > 1}:
        raise field_error(("rewards",), f"{', '.join(sorted(repeated))} is given twice")
