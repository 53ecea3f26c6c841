"""Shrinks a recipe to about a minute, so that every stage, the evaluation and the report are run once.

What cannot be had on this machine is replaced (:mod:`posttrain.recipe.stand_ins`). Then every setting that
costs time is lowered, as far as the schema allows. What a change breaks is left as it was.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from posttrain.data.prompts import prompt_rows
from posttrain.data.settings import PromptFile
from posttrain.recipe.checks import machine_problems
from posttrain.recipe.schema import Recipe
from posttrain.recipe.stand_ins import StandIns
from posttrain.registry import FieldPath
from posttrain.support.differences import differences

if TYPE_CHECKING:
    from posttrain.recipe.stand_ins import Block

Change = dict[FieldPath, Any]
"""Values of fields that go together, by their paths."""
SUFFIX = "-smoke"
"""Ends the name of a smoke run."""
TINY_SIDE, SIDE = 64, 256
"""Side in pixels of the images of a model that can make no larger ones, and of others."""
PROMPTS = 4
"""Prompts of the evaluation."""
BATCHES = 2
"""Batches that a stage trains on."""
LOWER = {"num_steps": 4, "trajectory_length": 2, "num_rollout_paths": 1}
"""An algorithm's fields that cost time, and the most that they are."""
AUTOENCODER = {"autoencoder_steps": 20, "autoencoder_images": 32}
"""The same of a model that is made."""


@dataclass(frozen=True)
class Smoke:
    """A shrunk recipe."""

    recipe: Recipe
    changes: list[str]
    """A line for each field that is changed: ``field (was old, now new)``, and why, if it had to be."""
    files: Mapping[Path, str]
    """Files that the recipe reads, and their text: to be written before it runs."""


def smoke_name(name: str) -> str:
    """The name of the smoke run of the recipe ``name``."""
    return name if name.endswith(SUFFIX) else name[: 80 - len(SUFFIX)] + SUFFIX


def smoke(recipe: Recipe, folder: Path) -> Smoke:
    """``recipe`` shrunk to about a minute on any machine, to be run in ``folder``. Writes nothing."""
    stand_ins = StandIns(recipe, machine_problems(recipe))
    plain = stand_ins.plain
    plain["name"] = smoke_name(recipe.name)
    plain["cache"] = {}
    plain["parallel"] = {"strategy": "auto"}
    files = _few_prompts(recipe, plain, folder)
    small = Recipe.model_validate(plain)
    for change in _lowered(plain, _side(small)):
        small, plain = _if_valid(small, plain, change)
    before, now = recipe.model_dump(mode="json"), small.model_dump(mode="json")
    return Smoke(small, [*_explained(differences(before, now), stand_ins.reasons)], files)


def _side(recipe: Recipe) -> int:
    """The side of a smoke run's images in pixels, which the model can take."""
    divisor, longest = recipe.model.sides() or (1, None)
    side = TINY_SIDE if longest is not None and longest < SIDE else SIDE
    return -(-side // divisor) * divisor


def _few_prompts(recipe: Recipe, plain: Block, folder: Path) -> dict[Path, str]:
    """Let the evaluation read a file with its first prompts, if it reads one; the file and its text."""
    block = plain["evaluation"]
    if block is None or block["prompts"]["type"] != "file":
        return {}
    assert recipe.evaluation is not None
    assert isinstance(recipe.evaluation.prompts, PromptFile)
    rows = prompt_rows(recipe.evaluation.prompts)[:PROMPTS]
    file = folder / "prompts.jsonl"
    block["prompts"] = {"type": "file", "path": str(file)}
    return {file: "".join(json.dumps(row) + "\n" for row in rows)}


def _if_valid(recipe: Recipe, plain: Block, change: Change) -> tuple[Recipe, Block]:
    """The recipe and its YAML values with all fields of ``change`` set; as given if the schema refuses."""
    changed = copy.deepcopy(plain)
    for path, value in change.items():
        block: Any = changed
        for part in path[:-1]:
            block = block[part]
        block[path[-1]] = value
    try:
        return Recipe.model_validate(changed), changed
    except ValidationError:
        return recipe, plain


def _lowered(plain: Block, side: int) -> Iterator[Change]:
    """Changes that save time, each of fields that go together. No field is raised."""
    model = plain["model"]
    yield {("model", name): min(model[name], most) for name, most in AUTOENCODER.items() if name in model}
    for i, stage in enumerate(plain["stages"]):
        yield from _lowered_stage(("stages", i), stage, side)
    if (block := plain["evaluation"]) is None:
        return
    at = ("evaluation",)
    most = {"images_per_prompt": 1, "steps": 4, "batch_size": PROMPTS, "grid": PROMPTS, "resolution": side}
    for name, value in most.items():
        yield {(*at, name): min(block[name], value)}
    if block["prompts"]["type"] == "shapes":
        yield {(*at, "prompts", "count"): min(block["prompts"]["count"], PROMPTS)}


def _lowered_stage(at: FieldPath, stage: Block, side: int) -> Iterator[Change]:
    train, algorithm, data = stage["train"], stage["algorithm"], stage["data"]
    each = min(train["steps_per_batch"], 2)
    steps = min(BATCHES * each, train["steps"])
    lengths: Change = {
        (*at, "train", name): value
        for name, value in {
            "batch_size": min(train["batch_size"], 4),
            "steps_per_batch": each,
            "steps": steps,
            "warmup_steps": min(train["warmup_steps"], steps - 1),
            "log_every": 1,
            "checkpoint_every": each,
            "keep_every": None,
            "sample_every": None if train["sample_every"] is None else steps,
        }.items()
    }
    if "group_size" in algorithm:
        lengths[*at, "algorithm", "group_size"] = 2
    if stage["monitor"] is not None:
        lengths |= {(*at, "monitor", "every"): each, (*at, "monitor", "prompts"): 2}
    yield lengths
    for name, most in LOWER.items():
        if name in algorithm:
            yield {(*at, "algorithm", name): min(algorithm[name], most)}
    if train["micro_batch"] != "auto":
        yield {(*at, "train", "micro_batch"): min(train["micro_batch"], 4)}
    if train["compile"] is True:  # 'auto' does not compile for so few steps
        given = train["gradient_checkpointing"]
        mode = "selective" if isinstance(given, float) else given
        yield {(*at, "train", "compile"): False, (*at, "train", "gradient_checkpointing"): mode}
    if "resolution" in data:
        yield {(*at, "data", "resolution"): min(data["resolution"] or side, side)}
    if isinstance(data.get("images"), int):
        yield {(*at, "data", "images"): min(data["images"], 16)}
    if isinstance(data.get("prompts"), dict) and "count" in data["prompts"]:
        yield {(*at, "data", "prompts", "count"): min(data["prompts"]["count"], PROMPTS)}


def _explained(lines: Iterator[str], reasons: Mapping[str, str]) -> Iterator[str]:
    """The lines, each with the reason of the block that it belongs to; reasons of other blocks after them."""
    told = set()
    for line in lines:
        field = line.partition(" ")[0]
        path = next((p for p in reasons if field == p or field.startswith(f"{p}.")), None)
        told.add(path)
        yield line if path is None else f"{line}: {reasons[path]}"
    for path, reason in reasons.items():
        if path not in told:
            yield f"{path}: {reason}"
