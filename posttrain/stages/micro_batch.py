"""Remembers in a stage's folder what was found by trying, so that a resumed run begins with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from posttrain.engine import modes
from posttrain.engine.micro_batch import Trial
from posttrain.engine.modes import Found, Mode
from posttrain.errors import DamagedError
from posttrain.recipe.schema import Recipe, Stage
from posttrain.stages.stage_state import Note
from posttrain.support.device import resolve
from posttrain.support.files import write
from posttrain.support.records import read_object

FILE, SET_ASIDE = "micro_batch.json", "micro_batch.damaged.json"


def set_damaged_aside(folder: Path, note: Note) -> None:
    """Give the file in a stage's ``folder`` a name that says so, and tell the user, if it is damaged."""
    if not (file := folder / FILE).exists():
        return
    try:
        content = read_object(file, "micro_batch")
        whole = {
            "micro_batch": _is_size(content["micro_batch"]),
            "modes": _are_modes(content.get("modes", [])),
        }
        if wrong := [repr(name) for name, is_whole in whole.items() if not is_whole]:
            raise DamagedError(f"{str(file)!r} is damaged: {' and '.join(wrong)} is not what was written")
    except DamagedError as error:
        file.replace(file.with_name(SET_ASIDE))
        note(f"{error}; it is now {SET_ASIDE!r}, and what it held is found again by trying")


def settled(recipe: Recipe, stage: Stage, folder: Path, processes: int) -> int | None:
    """The micro-batch that ``stage`` begins with; None where it must be found by trying first.

    It is the recipe's, or the remembered one where that is smaller or the recipe says ``auto``.
    """
    given, remembered = stage.train.micro_batch, _remembered(recipe, folder, processes)
    if remembered is not None:
        return remembered if given == "auto" else min(given, remembered)
    return None if given == "auto" else given


def settled_mode(recipe: Recipe, stage: Stage, folder: Path, processes: int) -> Mode | None:
    """The mode that ``stage`` computes in; None where it must be found by trying first."""
    if (decided := modes.settled(stage.train, resolve(recipe.device))) is not None:
        return decided
    found = _read(recipe, folder, processes).get("modes")
    if not found or not _are_modes(found) or found[0]["given"] != _given(stage):
        return None
    return Mode(found[0]["compiled"], found[0]["checkpointing"])


def remember(
    recipe: Recipe, folder: Path, processes: int, micro_batch: int, trials: list[Trial] | None = None
) -> None:
    """Write ``micro_batch``, and the ``trials`` that found it, to a stage's ``folder``.

    It holds for as many processes under the same strategy, on the same kind of device. Modes that were found
    stay.
    """
    content = {**_circumstances(recipe, processes), "micro_batch": micro_batch}
    if trials:
        content["trials"] = [asdict(trial) for trial in trials]
    if found := _read(recipe, folder, processes).get("modes"):
        content["modes"] = found
    write(folder / FILE, json.dumps(content, indent=2))


def remember_modes(
    recipe: Recipe, stage: Stage, folder: Path, processes: int, found: Sequence[Found]
) -> None:
    """Write the modes that were tried, the fastest first, and its micro-batch, to a stage's ``folder``."""
    tried = [
        {
            "compiled": one.mode.compiled,
            "checkpointing": one.mode.checkpointing,
            "given": _given(stage),
            "micro_batch": one.micro_batch,
            "trials": [asdict(trial) for trial in one.trials],
        }
        for one in found
    ]
    content = {**_circumstances(recipe, processes), "micro_batch": found[0].micro_batch, "modes": tried}
    write(folder / FILE, json.dumps(content, indent=2))


def _remembered(recipe: Recipe, folder: Path, processes: int) -> int | None:
    """The micro-batch in ``folder``; None where there is none, or it was found in other circumstances."""
    number = _read(recipe, folder, processes).get("micro_batch")
    return number if _is_size(number) else None


def _read(recipe: Recipe, folder: Path, processes: int) -> dict[str, Any]:
    """The content of the file in ``folder``; empty where there is none, or for other circumstances."""
    try:
        content = read_object(folder / FILE)
    except DamagedError:
        return {}
    now = _circumstances(recipe, processes)
    return content if {name: content.get(name) for name in now} == now else {}


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1  # a bool is no number here


def _are_modes(value: Any) -> bool:
    fields = {"compiled": (bool,), "checkpointing": (str, float), "given": (list,)}
    return isinstance(value, list) and all(
        isinstance(mode, dict) and all(isinstance(mode.get(name), kinds) for name, kinds in fields.items())
        for mode in value
    )


def _given(stage: Stage) -> list[Any]:
    """What the recipe says of the mode."""
    train = stage.train
    return [train.compile, train.gradient_checkpointing, train.micro_batch]


def _circumstances(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What a micro-batch depends on besides the stage."""
    device = resolve(recipe.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "parallel": recipe.parallel.model_dump(mode="json"), "processes": processes}
