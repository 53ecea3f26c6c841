"""Lists the folders whose weights, loaded in order, are those of a stage.

Beside the weights that other tools load, a stage's artifact keeps ``posttrain.json``: the model it belongs
to, the artifacts to load before it (a LoRA needs its parents), and how it was trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.model import Model
from posttrain.recipe.schema import BASE, Recipe, Stage
from posttrain.support.paths import is_path
from posttrain.weights.transformer import LORA

DESCRIPTION = "posttrain.json"


def describe(spec: Model, parents: Sequence[Path], stage: Stage, final: Path) -> dict[str, Any]:
    """The content of ``posttrain.json`` for what ``stage`` writes to ``final``."""
    return {
        "model": spec.model_dump(mode="json"),
        # relative, so that a run folder can be moved
        "parents": [os.path.relpath(parent, final) for parent in parents],
        "stage": stage.model_dump(mode="json"),
        "weights": exported_weights(stage),
    }


def exported_weights(stage: Stage) -> str:
    """Which weights ``stage`` exports: ``ema`` where it keeps an EMA, else ``raw``."""
    return "raw" if stage.train.ema is None else "ema"


def sources(recipe: Recipe, name: str, run_folder: Path) -> list[Path]:
    """The folders to load in order onto the base model for the weights of ``name``.

    ``name`` is a stage of the run in ``run_folder``, ``base``, or a path.
    """
    folders: list[Path] = []
    for ancestor in recipe.lineage_of(name):
        if is_path(ancestor):
            folders += with_parents(Path(ancestor).expanduser().absolute())
        elif ancestor != BASE:
            folders.append(run_folder / ancestor / "final")
    return folders


def with_parents(folder: Path) -> list[Path]:
    """``folder``, and before it the artifacts that its LoRA was trained on. Raises ModelError."""
    if not (folder / LORA).is_file() or not (folder / DESCRIPTION).is_file():
        return [folder]
    return [*(folder / parent for parent in json.loads(read_text(folder / DESCRIPTION))["parents"]), folder]


def read_text(path: Path) -> str:
    """The text of a file of an artifact. Raises ModelError where it cannot be read."""
    try:
        return path.read_text()
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
