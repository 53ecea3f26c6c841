"""Claims a run folder: one run at a time writes to it, and each begins where the one before stopped."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DamagedError, PosttrainError, RecipeError
from posttrain.recipe.file import dump_recipe, parse_recipe
from posttrain.recipe.schema import BASE, Recipe
from posttrain.stages.adjust import Reopened, adjust
from posttrain.stages.fresh import begin_anew, to_begin_anew
from posttrain.stages.leftovers import remove_leftovers
from posttrain.stages.stage_state import RECIPE, Note, whole_text
from posttrain.support.files import locked, write
from posttrain.support.records import read_object
from posttrain.support.versions import versions
from posttrain.support.write_errors import writing
from posttrain.weights.run_folders import REPORT, is_run

if TYPE_CHECKING:
    import torch

    from posttrain.distributed.world import World

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


LOOK_SECONDS = 0.5
"""A look at whether a process is at work takes less."""


@contextlib.contextmanager
def claimed(
    folder: Path, recipe: Recipe, device: torch.device, world: World, note: Note, fresh: Sequence[str] = ()
) -> Iterator[Reopened]:
    """Hold ``folder`` for this run during the block, with the run's description in it.

    Gives the finished stages that are to be opened again, see :mod:`posttrain.stages.adjust`. Every process
    calls it; the main one locks and writes. The stages ``fresh``, and those trained from their weights, begin
    anew. Raises PosttrainError where another run holds the folder, a process does not see it, or the report
    would replace a page of something else; RecipeError where ``recipe`` would change what was trained.
    """
    reopened: Reopened = {}
    with _exclusive(folder) if world.is_main else contextlib.nullcontext():
        if world.is_main:
            _spare_report(folder)
            remove_leftovers(folder)
            anew = to_begin_anew(folder, recipe, fresh)
            reopened = adjust(folder, recipe, note, anew)
            begin_anew(folder, anew, note)  # last: where the recipe is refused, nothing is removed
            _describe(folder, recipe, device, note)
        reopened = world.broadcast(reopened)
        if not (folder / RECIPE).is_file():
            raise PosttrainError(
                f"process {world.rank} does not see what process 0 wrote to {str(folder)!r}: the run "
                "folder must be one that all processes share"
            )
        yield reopened


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process. Raises PosttrainError where another run holds it."""
    with contextlib.ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # 'posttrain status' holds the lock for a moment
            free = stack.enter_context(locked(folder / ".lock", wait=LOOK_SECONDS))
        if not free:
            raise PosttrainError(f"another run is writing to {str(folder)!r}; wait for it or give --output")
        yield


def _spare_report(folder: Path) -> None:
    """Raise PosttrainError where the run's report would replace a page of something else."""
    if (folder / REPORT).exists() and not (is_run(folder) or (folder / RECIPE).exists()):
        raise PosttrainError(
            f"{str(folder)!r} is no run, and has a {REPORT} that the run's report would replace: give "
            "another --output, or the page another name"
        )


def _describe(folder: Path, recipe: Recipe, device: torch.device, note: Note) -> None:
    """Write the run's description, as far as ``folder`` lacks it, has another one, or a damaged one."""
    stages = [{"name": BASE, "parent": None, "algorithm": None}] + [
        {"name": s.name, "parent": recipe.parent(s), "algorithm": s.algorithm.type} for s in recipe.stages
    ]
    description = {"name": recipe.name, "stages": stages}
    if _read(folder / "run.json", note) != description:
        write(folder / "run.json", json.dumps(description, indent=2))
    if _read(folder / "environment.json", note) is None:
        write(folder / "environment.json", json.dumps(_environment(recipe, device), indent=2))
    if not _has_recipe(folder, recipe, note):
        write(folder / RECIPE, dump_recipe(recipe))  # last: a folder that has it is complete


def _read(file: Path, note: Note) -> dict[str, Any] | None:
    """The content of ``file``; None where it is missing, or damaged and to be made again."""
    if not file.exists():
        return None
    try:
        return read_object(file)
    except DamagedError as error:
        note(f"{error}; it is made again")
        return None


def _has_recipe(folder: Path, recipe: Recipe, note: Note) -> bool:
    """Whether ``folder`` has this recipe already. Tells which stages of the recipe before are left out."""
    if not (file := folder / RECIPE).exists():
        return False
    try:
        if (text := whole_text(file)) == dump_recipe(recipe):
            return True
        before = parse_recipe(text, str(file), checks=False)
    except RecipeError as error:
        note(f"{str(error).splitlines()[0]}; it is made again")
        return False
    for name in (stage.name for stage in before.stages if stage.name not in {s.name for s in recipe.stages}):
        if (folder / name).is_dir():
            note(f"{name}: is not in the recipe any more; its folder stays")
    return False


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
