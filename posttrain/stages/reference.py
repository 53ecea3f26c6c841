"""Loads the weights of a stage's reference role where the stage does not start from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.recipe.schema import Recipe, Stage
from posttrain.stages.lineage import exact, sources

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.model import FlowModel


def reference_weights(
    recipe: Recipe, stage: Stage, model: FlowModel, run_folder: Path
) -> dict[str, Tensor] | None:
    """Name -> weight of the transformer that ``stage.reference`` names; None where the stage starts from it.

    ``model`` holds the base weights, before and after. The result is in the CPU's memory: a device that is
    to hold a shard of each weight has no room for three models. Every process holds it whole, and while it is
    read the base weights too, because it is read through the model, which no strategy has spread yet.
    """
    if stage.reference is None or stage.reference == recipe.parent(stage):
        return None
    base = _copied(model)
    for source in sources(recipe, stage.reference, run_folder):
        model.load_weights(exact(source))
    reference = _copied(model)
    for name, parameter in model.transformer.named_parameters():
        parameter.data.copy_(base[name])
    return reference


def _copied(model: FlowModel) -> dict[str, Tensor]:
    """Name -> copy of the transformer's weight, on the CPU."""
    return {n: p.detach().to("cpu", copy=True) for n, p in model.transformer.named_parameters()}
