"""Chooses the model family of a diffusers pipeline by the class that its index names."""

from __future__ import annotations

import functools
from typing import Any

from posttrain.model import Model
from posttrain.registry import discover
from posttrain.weights.pipeline_folder import from_hub, index_of

DEFAULT_TYPE = "sd3"
"""Takes a path that names no known pipeline; its loader says what is wrong with it."""


@functools.cache
def _pipeline_on_hub(path: str) -> str | None:
    """The class of the pipeline that the hub has under a name. Without a network, asking takes a while."""
    return (index_of(path) or {}).get("_class_name")


def model_of(path: str) -> Model:
    """The recipe's ``model`` block for a diffusers folder or hub name."""
    families: dict[str, Any] = {**discover(Model, "posttrain.models")}
    pipeline = _pipeline_on_hub(path) if from_hub(path) else (index_of(path) or {}).get("_class_name")
    default = families[DEFAULT_TYPE]
    family = next((family for family in families.values() if pipeline in family.pipelines), default)
    return family.model_validate({"path": path})
