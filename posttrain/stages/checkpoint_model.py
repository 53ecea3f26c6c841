"""Opens a checkpoint of a stage as a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.engine.checkpoint import STATE, read
from posttrain.errors import ModelError
from posttrain.stages.lineage import sources

if TYPE_CHECKING:
    import torch

    from posttrain.model import FlowModel, Model
    from posttrain.recipe.schema import Recipe, Stage

EMA, RAW = "ema", "raw"
"""Which weights of a checkpoint are opened: the moving average, or those that are trained."""


def is_checkpoint(path: str) -> bool:
    """Whether ``path`` is a folder that :func:`posttrain.engine.checkpoint.save` wrote."""
    return (Path(path).expanduser() / STATE).is_file()


def open_checkpoint(path: str, device: torch.device, weights: str | None) -> tuple[FlowModel, Model, str]:
    """The model at the checkpoint ``runs/NAME/STAGE/checkpoints/step-N``, its ``model`` block, its weights.

    ``weights`` is "ema" or "raw"; by default the EMA's where the stage keeps one. Raises ModelError.
    """
    import torch

    folder = Path(path).expanduser().absolute()
    run_folder = folder.parents[2]
    recipe, stage = _recipe_and_stage(path, run_folder, folder.parents[1].name)
    state = read(folder, device)
    weights, tensors = _chosen(path, state, stage, weights)
    spec = recipe.model.build(run_folder / "model")
    model = spec.load(device, "fp32")
    for source in sources(recipe, recipe.parent(stage), run_folder):
        model.load_weights(source, merge=stage.tune.merges)
    stage.tune.apply(model.transformer, recipe.seed)
    parameters = dict(model.transformer.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return model, spec, weights


def _recipe_and_stage(path: str, run_folder: Path, name: str) -> tuple[Recipe, Stage]:
    """The recipe of the run that the checkpoint ``path`` belongs to, and its stage ``name``."""
    from posttrain.recipe.file import parse_recipe

    if not (file := run_folder / "recipe.yaml").is_file():
        raise ModelError(
            f"{path!r} is a checkpoint, but {str(run_folder)!r} has no recipe.yaml to say of what"
        )
    recipe = parse_recipe(file.read_text(), str(file), checks=False)
    stage = next((s for s in recipe.stages if s.name == name), None)
    if stage is None:
        raise ModelError(f"{path!r} is a checkpoint of {name!r}, which is no stage of {str(file)!r}")
    return recipe, stage


def _chosen(
    path: str, state: dict[str, Any], stage: Stage, weights: str | None
) -> tuple[str, dict[str, torch.Tensor]]:
    """Which weights are opened, and their tensors by name."""
    chosen = weights or (EMA if EMA in state["roles"] else RAW)
    if chosen == RAW:
        return RAW, state["trained"]
    if EMA not in state["roles"]:
        raise ModelError(
            f"{path!r} has no EMA weights: stage {stage.name!r} keeps none; there are the raw ones"
        )
    return EMA, state["roles"][EMA]
