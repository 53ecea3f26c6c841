"""What did a stage write, and how is it opened again: by a later stage, ``posttrain eval`` or ``sample``?

Beside the weights that other tools load, an artifact keeps ``posttrain.json``: the model it belongs to,
the artifacts to load before it (a LoRA needs its parents), and how it was trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from posttrain.errors import ModelError
from posttrain.model import FlowModel, Model, Sampler
from posttrain.model_choice import model_of
from posttrain.pipeline_folder import local_folder
from posttrain.snapshot import is_checkpoint, open_checkpoint
from posttrain.transformer_files import LORA

if TYPE_CHECKING:
    import torch

    from posttrain.recipe import Recipe, Stage
    from posttrain.sampling_settings import Sampling

DESCRIPTION = "posttrain.json"


def describe(spec: Model, parents: Sequence[Path], stage: Stage, final: Path) -> dict[str, Any]:
    """The content of ``posttrain.json`` for what ``stage`` writes to ``final``."""
    return {
        "model": spec.model_dump(mode="json"),
        # relative, so that a run folder can be moved
        "parents": [os.path.relpath(parent, final) for parent in parents],
        "stage": stage.model_dump(mode="json"),
        "weights": "raw" if stage.train.ema is None else "ema",
    }


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
    from posttrain.sampling import flow_sampler, sampler_of

    if weights is None and not is_checkpoint(path):
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
    if is_checkpoint(path):
        if base is not None:
            raise ModelError(f"--base is for a LoRA that was written; {path!r} is a checkpoint of a run")
        return open_checkpoint(path, device, weights)
    if weights is not None:
        raise ModelError(f"--weights is for a checkpoint; {path!r} has one set of weights")
    spec, adapters, found = _described(path, base)
    model = spec.load(device, "fp32")
    for source in adapters:
        model.load_weights(source)
    return model, spec, found


def _described(path: str, base: str | None) -> tuple[Model, list[Path], str]:
    """The model that ``path`` is or builds on, what to load onto it in turn, and which weights they are."""
    from posttrain.recipe import AnyModel

    folder = local_folder(path)
    if folder is not None and (folder / "final").is_dir():
        folder = folder / "final"
    elif folder is not None and (checkpoints := sorted((folder / "checkpoints").glob("step-*"))):
        raise ModelError(
            f"the stage {str(folder)!r} is not finished; "
            f"give a checkpoint of it, such as {str(checkpoints[-1])!r}"
        )
    described = (
        json.loads(_text(folder / DESCRIPTION)) if folder and (folder / DESCRIPTION).is_file() else None
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


def sources(recipe: Recipe, name: str, run: Path) -> list[Path]:
    """The folders whose weights, loaded in order onto the base model, are those of ``name`` (a stage of the
    run in folder ``run``, ``base``, or a path)."""
    from posttrain.recipe import BASE, is_path

    found: list[Path] = []
    for step in recipe.lineage_of(name):
        if is_path(step):
            found += with_parents(Path(step).expanduser().absolute())
        elif step != BASE:
            found.append(run / step / "final")
    return found


def with_parents(folder: Path) -> list[Path]:
    """What must be loaded in turn to have the weights of ``folder``: a LoRA's parents come before it."""
    if not (folder / LORA).is_file() or not (folder / DESCRIPTION).is_file():
        return [folder]
    return [*(folder / parent for parent in json.loads(_text(folder / DESCRIPTION))["parents"]), folder]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
