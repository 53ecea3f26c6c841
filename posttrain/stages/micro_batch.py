"""Remembers a stage's micro-batch in its folder, so that a resumed run begins with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from posttrain.engine.micro_batch import Trial
from posttrain.recipe.schema import Recipe, Stage
from posttrain.support.device import resolve
from posttrain.support.files import write

FILE = "micro_batch.json"


def settled(recipe: Recipe, stage: Stage, folder: Path, processes: int) -> int | None:
    """The micro-batch that ``stage`` begins with; None where it must be found by trying first.

    It is the recipe's, or the remembered one where that is smaller or the recipe says ``auto``.
    """
    given, remembered = stage.train.micro_batch, _remembered(recipe, folder, processes)
    if remembered is not None:
        return remembered if given == "auto" else min(given, remembered)
    return None if given == "auto" else given


def remember(
    recipe: Recipe, folder: Path, processes: int, micro_batch: int, trials: list[Trial] | None = None
) -> None:
    """Write ``micro_batch``, and the ``trials`` that found it, to a stage's ``folder``.

    It holds for as many processes under the same strategy, on the same kind of device.
    """
    content = {**_circumstances(recipe, processes), "micro_batch": micro_batch}
    if trials:
        content["trials"] = [asdict(trial) for trial in trials]
    write(folder / FILE, json.dumps(content, indent=2))


def _remembered(recipe: Recipe, folder: Path, processes: int) -> int | None:
    """The micro-batch in ``folder``; None where there is none, or it was found in other circumstances."""
    try:
        content = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    now = _circumstances(recipe, processes)
    if not isinstance(content, dict) or {name: content.get(name) for name in now} != now:
        return None
    number = content.get("micro_batch")
    return number if type(number) is int and number >= 1 else None  # a bool is no number here


def _circumstances(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What a micro-batch depends on besides the stage."""
    device = resolve(recipe.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "parallel": recipe.parallel.model_dump(mode="json"), "processes": processes}
