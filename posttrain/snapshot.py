"""How is a checkpoint of a stage in training opened as a model, to be evaluated or sampled?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.checkpoint import STATE
from posttrain.errors import ModelError

if TYPE_CHECKING:
    import torch

    from posttrain.model import FlowModel, Model

EMA, RAW = "ema", "raw"


def is_checkpoint(path: str) -> bool:
    """Whether ``path`` is a folder that :func:`posttrain.checkpoint.save` wrote."""
    return (Path(path).expanduser() / STATE).is_file()


def open_checkpoint(path: str, device: torch.device, weights: str | None) -> tuple[FlowModel, Model, str]:
    """The model as it was at a checkpoint, ``runs/NAME/STAGE/checkpoints/step-N``, what its base was loaded
    by, and which weights it has.

    ``weights`` is ``ema`` or ``raw``; by default the EMA's where the stage keeps one. Raises ModelError.
    """
    import torch

    from posttrain.artifact import sources
    from posttrain.checkpoint import read
    from posttrain.recipe_file import parse_recipe

    folder = Path(path).expanduser().absolute()
    run, name = folder.parents[2], folder.parents[1].name
    if not (file := run / "recipe.yaml").is_file():
        raise ModelError(f"{path!r} is a checkpoint, but {str(run)!r} has no recipe.yaml to say of what")
    recipe = parse_recipe(file.read_text(), str(file), checks=False)
    stage = next((s for s in recipe.stages if s.name == name), None)
    if stage is None:
        raise ModelError(f"{path!r} is a checkpoint of {name!r}, which is no stage of {str(file)!r}")
    state = read(folder, device)
    chosen = weights or (EMA if EMA in state["roles"] else RAW)
    if chosen == EMA and EMA not in state["roles"]:
        raise ModelError(f"{path!r} has no EMA weights: stage {name!r} keeps none; there are the raw ones")
    spec = recipe.model.materialise(run / "model")
    model = spec.load(device, "fp32")
    for source in sources(recipe, recipe.parent(stage), run):
        model.load_weights(source, merge=stage.tune.merges)
    stage.tune.apply(model.transformer, recipe.seed)
    parameters = dict(model.transformer.named_parameters())
    kept = state["trained"] if chosen == RAW else state["roles"][EMA]
    with torch.no_grad():
        for key, tensor in kept.items():
            parameters[key].copy_(tensor)
    return model, spec, chosen
