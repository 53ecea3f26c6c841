"""Remembers a stage's micro-batch in its folder, so that a run that goes on begins with it."""

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


def settled(recipe: Recipe, stage: Stage, folder: Path, size: int) -> int | None:
    """The number to begin with; None where it is to be found first."""
    given, found = stage.train.micro_batch, _remembered(recipe, folder, size)
    if found is not None:
        return found if given == "auto" else min(given, found)
    return None if given == "auto" else given


def remember(recipe: Recipe, folder: Path, size: int, number: int, trials: list[Trial] | None = None) -> None:
    """Keep ``number`` for when the run goes on in as many processes, under the same strategy, on such a
    device."""
    about = {**_circumstances(recipe, size), "micro_batch": number}
    if trials:
        about["trials"] = [asdict(made) for made in trials]
    write(folder / FILE, json.dumps(about, indent=2))


def _remembered(recipe: Recipe, folder: Path, size: int) -> int | None:
    try:
        found = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    now = _circumstances(recipe, size)
    if not isinstance(found, dict) or {name: found.get(name) for name in now} != now:
        return None
    number = found.get("micro_batch")
    return number if type(number) is int and number >= 1 else None


def _circumstances(recipe: Recipe, size: int) -> dict[str, Any]:
    device = resolve(recipe.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "parallel": recipe.parallel.model_dump(mode="json"), "processes": size}
