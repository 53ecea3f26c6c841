"""Lists the folders whose weights, loaded in order, are those of a stage.

Beside the weights that other tools load, a stage's artifact keeps ``posttrain.json``: the model it belongs
to, the artifacts to load before it (a LoRA needs its parents), and how it was trained.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from posttrain.errors import DamagedError, ModelError
from posttrain.model import Model
from posttrain.recipe.schema import BASE, Recipe, Stage
from posttrain.recipe.variants import AnyModel
from posttrain.support.paths import expanded, is_path
from posttrain.support.records import read_object
from posttrain.weights.fingerprints import Prints, by_component
from posttrain.weights.run_folders import DESCRIPTION, FINAL, last_stage, meaning_of, weights_folder
from posttrain.weights.transformer import LORA

EXACT = "exact"
"""In a stage's folder: the float32 weights, where those of ``final`` are rounded."""


def describe(spec: Model, parents: Sequence[Path], stage: Stage, final: Path, base: Prints) -> dict[str, Any]:
    """The content of ``posttrain.json`` for what ``stage`` writes to ``final``.

    ``base`` has the prints of the base model's files."""
    return {
        "model": TypeAdapter(AnyModel).dump_python(spec, mode="json"),
        # relative, so that a run folder can be moved; without links, through which .. leads elsewhere
        "parents": [os.path.relpath(os.path.realpath(p), os.path.realpath(final)) for p in parents],
        "stage": stage.model_dump(mode="json"),
        "weights": exported_weights(stage),
        "base": by_component(base),
        # with sizes and times, so that opening a LoRA need not read the transformer again to know it
        "transformer": {name: kept for name, kept in base.items() if name.startswith("transformer/")},
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
            folders += with_parents(weights_folder(expanded(ancestor).absolute()))
        elif ancestor != BASE:
            folders.append(run_folder / ancestor / FINAL)
    return folders


def runs_named(recipe: Recipe) -> list[str]:
    """A line for each run's folder that the recipe names as weights: which stage it stands for."""
    stages = [name for stage in recipe.stages for name in (stage.start_from, stage.reference)]
    paths = dict.fromkeys(name for name in stages if name is not None and is_path(name))
    return [line for path in (model_path(recipe.model), *paths) if path and (line := meaning_of(path))]


def model_path(spec: Model) -> str | None:
    """The path in a recipe's ``model`` block, if its type has one."""
    path = getattr(spec, "path", None)
    return path if isinstance(path, str) else None


def pinned(spec: Model) -> Model:
    """``spec`` with the stage in its path, if that is a run's folder: later the run may have another last
    stage."""
    if (path := model_path(spec)) is None or (stage := last_stage(expanded(path))) is None:
        return spec
    return spec.model_copy(update={"path": str(Path(path) / stage)})


def exact(artifact: Path) -> Path:
    """The folder with the weights of ``artifact`` from which a stage starts: those that were trained, where
    the stage that wrote it keeps them beside it, else itself."""
    place = artifact.resolve()  # a link to it has another name and other neighbours
    kept = place.with_name(EXACT)
    return kept if place.name == FINAL and kept.is_dir() else artifact


def with_parents(folder: Path) -> list[Path]:
    """``folder``, and before it the artifacts that its LoRA was trained on. Raises ModelError, also where one
    of them is gone."""
    if not (folder / LORA).is_file() or not (folder / DESCRIPTION).is_file():
        return [folder]
    parents = [folder / parent for parent in described(folder)["parents"]]
    if gone := [os.path.normpath(parent) for parent in parents if _is_gone(parent)]:
        raise ModelError(f"{str(folder)!r} is a LoRA on top of {gone[0]!r}, which holds no weights any more")
    return [*parents, folder]


def _is_gone(artifact: Path) -> bool:
    """Whether the folder of ``artifact`` is not there, or holds no more than descriptions and images."""
    beside = (".json", ".md", ".png")
    return not artifact.is_dir() or all(p.suffix in beside and p.is_file() for p in artifact.iterdir())


def described(folder: Path) -> dict[str, Any]:
    """The content of the artifact's ``posttrain.json``. Raises ModelError where it cannot be read or lacks a
    field."""
    file = folder / DESCRIPTION
    try:
        content = read_object(file)
    except DamagedError as error:
        raise ModelError(str(error)) from error
    parents = content.get("parents")
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ModelError(f"{str(file)!r} cannot be read: 'parents' is no list of folders")
    for field, kind in (("model", dict), ("weights", str)):
        if not isinstance(content.get(field), kind):
            raise ModelError(f"{str(file)!r} cannot be read: it has no {field!r}")
    content.setdefault("dtype", "fp32")
    for field in ("base", "transformer"):  # which earlier versions did not write
        if not isinstance(content.setdefault(field, {}), dict):
            raise ModelError(f"{str(file)!r} cannot be read: {field!r} is no object")
    return content
