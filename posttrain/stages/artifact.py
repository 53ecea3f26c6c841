"""Opens as a model what a stage wrote: for a later stage, ``posttrain eval`` or ``posttrain sample``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from posttrain.errors import ModelError
from posttrain.model import FlowModel, Model, Sampler
from posttrain.stages.checkpoint_model import is_checkpoint, open_checkpoint
from posttrain.stages.lineage import DESCRIPTION, read_text, with_parents
from posttrain.stages.model_choice import model_of
from posttrain.weights.pipeline_folder import local_folder
from posttrain.weights.transformer import LORA

if TYPE_CHECKING:
    import torch

    from posttrain.flow.sampling_settings import Sampling


@dataclass(frozen=True)
class Artifact:
    """A model and the weights to load onto it."""

    spec: Model
    """The recipe's ``model`` block; its path is the artifact's own where that is a whole pipeline."""
    adapters: list[Path]
    """Folders whose weights are loaded in order."""
    weights: str
    """Which weights they are: "ema", "raw", or "base" for a pipeline that no stage wrote."""


def open_artifact(
    path: str, device: torch.device, base: str | None = None, weights: str | None = None
) -> tuple[FlowModel, str]:
    """Load the model at ``path``: a stage's folder, its ``final`` folder, one of its checkpoints, a diffusers
    folder, or a hub name.

    ``base`` replaces the model that a LoRA was trained on. ``weights`` chooses "raw" or "ema" of a
    checkpoint. Returns the model and which weights it has ("base" for a pipeline that no stage wrote).
    Raises ModelError.
    """
    model, _, opened = _open(path, device, base, weights)
    return model, opened


def open_sampler(
    path: str,
    device: torch.device,
    settings: Sampling,
    base: str | None = None,
    weights: str | None = None,
) -> tuple[Sampler, str]:
    """As :func:`open_artifact`, ready to draw images; also opens models that cannot be trained."""
    from posttrain.sampling.sampler import flow_sampler, sampler_of

    if weights is None and not is_checkpoint(path):
        artifact = _describe(path, base)
        if not artifact.spec.trainable:
            if artifact.adapters:
                kind = artifact.spec.type
                raise ModelError(f"{path!r} is a LoRA, and those of {kind} models cannot be loaded")
            return sampler_of(artifact.spec, device, settings), artifact.weights
    model, spec, opened = _open(path, device, base, weights)
    return flow_sampler(model, spec, settings, path), opened


def _open(
    path: str, device: torch.device, base: str | None, weights: str | None
) -> tuple[FlowModel, Model, str]:
    """The model, its ``model`` block, and which weights it has."""
    if is_checkpoint(path):
        if base is not None:
            raise ModelError(f"--base is for a LoRA that was written; {path!r} is a checkpoint of a run")
        return open_checkpoint(path, device, weights)
    if weights is not None:
        raise ModelError(f"--weights is for a checkpoint; {path!r} has one set of weights")
    artifact = _describe(path, base)
    model = artifact.spec.load(device, "fp32")
    for source in artifact.adapters:
        model.load_weights(source)
    return model, artifact.spec, artifact.weights


def _describe(path: str, base: str | None) -> Artifact:
    """What :func:`open_artifact` has to load for ``path``, unless that is a checkpoint. Raises ModelError."""
    folder = _finished(local_folder(path))
    description = _description(folder)
    is_lora = folder is not None and (folder / LORA).is_file()
    if not is_lora and base is not None:
        raise ModelError(f"--base is for a LoRA; {path!r} is a whole pipeline")
    spec = _spec(path, folder, description, base, is_lora)
    adapters = with_parents(folder) if folder is not None else []
    if "path" in type(spec).model_fields:
        if (source := base if is_lora else folder and str(folder)) is not None:
            spec = spec.model_copy(update={"path": source})
        if not is_lora:
            adapters = []  # the path holds all weights
    default = "raw" if is_lora else "base"
    return Artifact(spec, adapters, description["weights"] if description else default)


def _finished(folder: Path | None) -> Path | None:
    """The ``final`` folder of a stage's ``folder``; other folders are returned unchanged.

    Raises ModelError for a stage that is not finished.
    """
    if folder is None or not (folder / "final").is_dir():
        if folder is not None and (checkpoints := sorted((folder / "checkpoints").glob("step-*"))):
            raise ModelError(
                f"the stage {str(folder)!r} is not finished; "
                f"give a checkpoint of it, such as {str(checkpoints[-1])!r}"
            )
        return folder
    return folder / "final"


def _description(folder: Path | None) -> dict[str, Any] | None:
    """The content of the artifact's ``posttrain.json``; None where there is none."""
    if folder is None or not (folder / DESCRIPTION).is_file():
        return None
    return json.loads(read_text(folder / DESCRIPTION))


def _spec(
    path: str, folder: Path | None, description: dict[str, Any] | None, base: str | None, is_lora: bool
) -> Model:
    """The ``model`` block that the artifact names, or else that fits its pipeline."""
    from posttrain.recipe.variants import AnyModel

    if description is not None:
        return TypeAdapter(AnyModel).validate_python(description["model"])
    if not is_lora:
        return model_of(path)
    if base is None:
        raise ModelError(
            f"{str(folder)!r} is a LoRA without {DESCRIPTION}: say with --base which model it is for"
        )
    return model_of(base)
