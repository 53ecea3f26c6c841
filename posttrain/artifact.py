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
from posttrain.model import FlowModel, Model

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from posttrain.recipe import Evaluation, Stage

DESCRIPTION = "posttrain.json"
LORA = "pytorch_lora_weights.safetensors"


def describe(spec: Model, parents: Sequence[Path], stage: Stage, final: Path) -> dict[str, Any]:
    """The content of ``posttrain.json`` for what ``stage`` writes to ``final``."""
    return {
        "model": spec.model_dump(mode="json"),
        # relative, so that a run folder can be moved
        "parents": [os.path.relpath(parent, final) for parent in parents],
        "stage": stage.model_dump(mode="json"),
        "weights": "raw" if stage.train.ema is None else "ema",
    }


def open_artifact(path: str, device: torch.device, base: str | None = None) -> tuple[FlowModel, str]:
    """Load what ``path`` names: a stage's folder, its ``final`` folder, a diffusers folder, or a hub name.

    ``base`` replaces the model that a LoRA was trained on. Returns the model and which weights they are
    ("raw", "ema", or "base" for a pipeline that no stage wrote). Raises ModelError.
    """
    from posttrain.models._weights import local_folder
    from posttrain.models.sd3 import SD3
    from posttrain.recipe import AnyModel

    folder = local_folder(path)
    if folder is not None and (folder / "final").is_dir():
        folder = folder / "final"
    described = (
        json.loads(_text(folder / DESCRIPTION)) if folder and (folder / DESCRIPTION).is_file() else None
    )
    spec: Model = (
        TypeAdapter(AnyModel).validate_python(described["model"])
        if described
        else SD3.model_validate({"path": path})
    )
    if folder is None or not (folder / LORA).is_file():
        if base is not None:
            raise ModelError(f"--base is for a LoRA; {path!r} is a whole pipeline")
        if folder is not None:
            spec = spec.model_copy(update={"path": str(folder)})
        return spec.load(device, "fp32"), described["weights"] if described else "base"
    if base is not None:
        spec = spec.model_copy(update={"path": base})
    elif described is None:
        raise ModelError(
            f"{str(folder)!r} is a LoRA without {DESCRIPTION}: say with --base which model it is for"
        )
    model = spec.load(device, "fp32")
    for source in with_parents(folder):
        model.load_weights(source)
    return model, described["weights"] if described else "raw"


def with_parents(folder: Path) -> list[Path]:
    """What must be loaded in turn to have the weights of ``folder``: a LoRA's parents come before it."""
    if not (folder / LORA).is_file() or not (folder / DESCRIPTION).is_file():
        return [folder]
    return [*(folder / parent for parent in json.loads(_text(folder / DESCRIPTION))["parents"]), folder]


def evaluate_artifact(
    model: FlowModel,
    evaluation: Evaluation,
    target: Path,
    name: str,
    source: str,
    weights: str,
    console: Console,
) -> dict[str, Any] | None:
    """Evaluate ``model`` into ``target``; see :func:`posttrain.evaluate.evaluate`."""
    from posttrain.evaluate import evaluate
    from posttrain.policy import Policy
    from posttrain.sampling import FlowSampler
    from posttrain.stage import AUTOCAST

    policy = Policy(model, autocast=AUTOCAST[evaluation.precision], chunk=evaluation.batch_size)
    sampler = FlowSampler(policy, source)
    return evaluate(sampler, evaluation, target, name=name, weights=weights, console=console)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
