"""Claims a run folder: one run at a time writes to it, and all of them are of the same recipe."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import PosttrainError, RecipeError
from posttrain.recipe.file import dump_recipe, parse_recipe
from posttrain.recipe.schema import BASE, Recipe
from posttrain.support.differences import differences
from posttrain.support.files import locked, write, writing
from posttrain.support.versions import versions

if TYPE_CHECKING:
    import torch

    from posttrain.distributed.world import World

RECIPE = "recipe.yaml"
PACKAGES = (
    "posttrain",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "pydantic",
    "numpy",
    "pillow",
)
"""Packages whose versions ``environment.json`` keeps."""
NEUTRAL = ("device", "parallel", "cache.path", "cache.max_size", "model.offload")
"""Fields that may differ when a run is resumed: they change no result."""


@contextlib.contextmanager
def claimed(folder: Path, recipe: Recipe, device: torch.device, world: World) -> Iterator[None]:
    """Hold ``folder`` for this run during the block, with the run's description in it.

    Every process calls it; the main one locks and writes. Raises PosttrainError where another run holds the
    folder or a process does not see it, RecipeError where it holds a run of another recipe.
    """
    with _exclusive(folder) if world.is_main else contextlib.nullcontext():
        if world.is_main:
            _describe_or_compare(folder, recipe, device)
        world.barrier()
        if not (folder / RECIPE).is_file():
            raise PosttrainError(
                f"process {world.rank} does not see what process 0 wrote to {str(folder)!r}: the run "
                "folder must be one that all processes share"
            )
        yield


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process. Raises PosttrainError where another run holds it."""
    with contextlib.ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            free = stack.enter_context(locked(folder / ".lock", wait=False))
        if not free:
            raise PosttrainError(f"another run is writing to {str(folder)!r}; wait for it or give --output")
        yield


def _describe_or_compare(folder: Path, recipe: Recipe, device: torch.device) -> None:
    """Write the run's description to a new ``folder``, or check that it holds a run of this recipe."""
    if (file := folder / RECIPE).is_file():
        _compare(file, recipe)
        return
    stages = [{"name": BASE, "parent": None, "algorithm": None}] + [
        {"name": s.name, "parent": recipe.parent(s), "algorithm": s.algorithm.type} for s in recipe.stages
    ]
    write(folder / "run.json", json.dumps({"name": recipe.name, "stages": stages}, indent=2))
    write(folder / "environment.json", json.dumps(_environment(recipe, device), indent=2))
    write(file, dump_recipe(recipe))  # last: a folder that has it is complete


def _compare(file: Path, recipe: Recipe) -> None:
    """Raise RecipeError where the recipe in ``file`` differs in a field that changes results."""
    before = parse_recipe(file.read_text("utf-8"), str(file), checks=False)
    old, new = before.model_dump(mode="json"), recipe.model_dump(mode="json")
    if changed := list(differences(old, new, NEUTRAL)):
        raise RecipeError(
            f"{str(file.parent)!r} holds a run of another recipe; it differs in: {'; '.join(changed[:5])}. "
            "Give another --output or name, or remove the folder"
        )


def _environment(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The content of ``environment.json``: versions, machine, seed and command."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": versions(PACKAGES),
        "device": f"{device} {name}".strip(),
        "threads": torch.get_num_threads(),
        "seed": recipe.seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
