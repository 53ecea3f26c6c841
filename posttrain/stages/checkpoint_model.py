"""Opens a checkpoint of a stage as a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.engine.checkpoint import STATE, verified
from posttrain.engine.manifest import MANIFEST, Damage
from posttrain.errors import ModelError, RecipeError
from posttrain.model import loaded
from posttrain.recipe.deciding import fingerprint, former_fingerprint
from posttrain.stages.lineage import exact, sources
from posttrain.stages.stage_state import recorded
from posttrain.support.paths import expanded, is_file
from posttrain.weights.transformer import fits

if TYPE_CHECKING:
    import torch

    from posttrain.engine.state import StoredState
    from posttrain.model import FlowModel, Model
    from posttrain.policy.piece import Stored
    from posttrain.recipe.schema import Recipe, Stage

EMA, RAW = "ema", "raw"
"""Which weights of a checkpoint are opened: the moving average, or those that are trained."""


def is_checkpoint(path: str) -> bool:
    """Whether ``path`` is a folder that :mod:`posttrain.engine.writing` wrote, damaged or not."""
    return any(is_file(expanded(path) / name) for name in (STATE, MANIFEST))


def open_checkpoint(path: str, device: torch.device, weights: str | None) -> tuple[FlowModel, Model, str]:
    """The model at the checkpoint ``runs/NAME/STAGE/checkpoints/step-N``, its ``model`` block, its weights.

    ``weights`` is "ema" or "raw"; by default the EMA's where the stage keeps one. Raises ModelError.
    """
    import torch

    folder = expanded(path).absolute()
    run_folder = folder.parents[2]
    recipe, stage = _recipe_and_stage(path, run_folder, folder.parents[1].name)
    try:
        state = verified(folder, *(of(recipe, stage.name) for of in (fingerprint, former_fingerprint)))
    except Damage as damage:
        raise ModelError(f"the checkpoint {path!r} cannot be used: {damage}") from damage
    weights, chosen = _chosen(path, state, stage, weights)
    tensors = {name: stored.whole() for name, stored in chosen.items()}
    spec = recipe.model.build(run_folder / "model", device)
    model = loaded(spec, device, "fp32")
    for source in sources(recipe, recipe.parent(stage), run_folder):
        model.load_weights(exact(source), merge=stage.tune.merges)
    stage.tune.apply(model.transformer, recipe.seed)
    parameters = dict(model.transformer.named_parameters())
    fits({name: p for name, p in parameters.items() if p.requires_grad}, tensors, folder)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return model, spec, weights


def _recipe_and_stage(path: str, run_folder: Path, name: str) -> tuple[Recipe, Stage]:
    """The recipe by which the checkpoint ``path`` was trained, and its stage ``name``."""
    try:
        recipe = recorded(run_folder, name)
    except RecipeError as error:
        raise ModelError(f"{path!r} is a checkpoint, but {error}") from error
    return recipe, next(stage for stage in recipe.stages if stage.name == name)


def _chosen(
    path: str, state: StoredState, stage: Stage, weights: str | None
) -> tuple[str, dict[str, Stored]]:
    """Which weights are opened, and their tensors by name."""
    chosen = weights or (EMA if EMA in state.roles else RAW)
    if chosen == RAW:
        return RAW, state.trained
    if EMA not in state.roles:
        raise ModelError(
            f"{path!r} has no EMA weights: stage {stage.name!r} keeps none; there are the raw ones"
        )
    return EMA, state.roles[EMA]
