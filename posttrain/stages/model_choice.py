"""Chooses the model family of a diffusers pipeline by the class that its index names."""

from __future__ import annotations

from typing import Any

from posttrain.model import Model
from posttrain.registry import discover
from posttrain.weights.pipeline_folder import index_of

FIRST = "sd3"
"""The type that takes a path of which nothing is known: its loader says what is wrong."""


def model_of(path: str) -> Model:
    """The recipe's ``model`` block for a diffusers folder or hub name."""
    families: dict[str, Any] = {**discover(Model, "posttrain.models")}
    kind = (index_of(path) or {}).get("_class_name")
    chosen = next((family for family in families.values() if kind in family.pipelines), families[FIRST])
    return chosen.model_validate({"path": path})
