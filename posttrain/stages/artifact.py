"""What a stage wrote, opened again as a model: by a later stage, ``posttrain eval`` or ``sample``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from posttrain.engine.checkpoint import STATE, read
from posttrain.errors import ModelError
from posttrain.model import FlowModel, Model, Sampler
from posttrain.stages.lineage import DESCRIPTION, read_text, sources, with_parents
from posttrain.stages.model_choice import model_of
from posttrain.weights.pipeline_folder import local_folder
from posttrain.weights.transformer import LORA

if TYPE_CHECKING:
    import torch

    from posttrain.flow.sampling_settings import Sampling


EMA, RAW = "ema", "raw"
"""Which weights of a checkpoint are opened."""


def open_artifact(
    path: str, device: torch.device, base: str | None = None, weights: str | None = None
) -> tuple[FlowModel, str]:
    """Load what ``path`` names: a stage's folder, its ``final`` folder, one of its checkpoints, a diffusers
    folder, or a hub name.

    ``base`` replaces the model that a LoRA was trained on; ``weights``, of a checkpoint, chooses "raw" or
    "ema". Returns the model and which weights they are ("base" for a pipeline that no stage wrote). Raises
    ModelError.
    """
    model, _, found = _opened(path, device, base, weights)
    return model, found


def open_sampler(
    path: str,
    device: torch.device,
    settings: Sampling,
    base: str | None = None,
    weights: str | None = None,
) -> tuple[Sampler, str]:
    """As :func:`open_artifact`, ready to draw images; also of models that cannot be trained."""
    from posttrain.sampling.sampler import flow_sampler, sampler_of

    if weights is None and not _is_checkpoint(path):
        spec, adapters, found = _described(path, base)
        if not spec.trainable:
            if adapters:
                raise ModelError(f"{path!r} is a LoRA, and those of {spec.type} models cannot be loaded")
            return sampler_of(spec, device, settings), found
    model, spec, found = _opened(path, device, base, weights)
    return flow_sampler(model, spec, settings, path), found


def _opened(
    path: str, device: torch.device, base: str | None, weights: str | None
) -> tuple[FlowModel, Model, str]:
    """The model, what loaded it, and which weights it has."""
    if _is_checkpoint(path):
        if base is not None:
            raise ModelError(f"--base is for a LoRA that was written; {path!r} is a checkpoint of a run")
        return _open_checkpoint(path, device, weights)
    if weights is not None:
        raise ModelError(f"--weights is for a checkpoint; {path!r} has one set of weights")
    spec, adapters, found = _described(path, base)
    model = spec.load(device, "fp32")
    for source in adapters:
        model.load_weights(source)
    return model, spec, found


def _described(path: str, base: str | None) -> tuple[Model, list[Path], str]:
    """The model that ``path`` is or builds on, what to load onto it in turn, and which weights they are."""
    from posttrain.recipe.variants import AnyModel

    folder = local_folder(path)
    if folder is not None and (folder / "final").is_dir():
        folder = folder / "final"
    elif folder is not None and (checkpoints := sorted((folder / "checkpoints").glob("step-*"))):
        raise ModelError(
            f"the stage {str(folder)!r} is not finished; "
            f"give a checkpoint of it, such as {str(checkpoints[-1])!r}"
        )
    described = (
        json.loads(read_text(folder / DESCRIPTION)) if folder and (folder / DESCRIPTION).is_file() else None
    )
    lora = folder is not None and (folder / LORA).is_file()
    if described is not None:
        spec: Model = TypeAdapter(AnyModel).validate_python(described["model"])
    elif lora:
        if base is None:
            raise ModelError(
                f"{str(folder)!r} is a LoRA without {DESCRIPTION}: say with --base which model it is for"
            )
        spec = model_of(base)
    else:
        spec = model_of(path)
    if not lora and base is not None:
        raise ModelError(f"--base is for a LoRA; {path!r} is a whole pipeline")
    weights = described["weights"] if described else "raw" if lora else "base"
    if "path" not in type(spec).model_fields:
        return spec, with_parents(folder) if folder else [], weights
    if (source := base if lora else folder and str(folder)) is not None:
        spec = spec.model_copy(update={"path": source})
    return spec, with_parents(folder) if lora and folder else [], weights


def _is_checkpoint(path: str) -> bool:
    """Whether ``path`` is a folder that :func:`posttrain.engine.checkpoint.save` wrote."""
    return (Path(path).expanduser() / STATE).is_file()


def _open_checkpoint(path: str, device: torch.device, weights: str | None) -> tuple[FlowModel, Model, str]:
    """The model as it was at a checkpoint, ``runs/NAME/STAGE/checkpoints/step-N``, what its base was loaded
    by, and which weights it has.

    ``weights`` is ``ema`` or ``raw``; by default the EMA's where the stage keeps one. Raises ModelError.
    """
    import torch

    from posttrain.recipe.file import parse_recipe

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
