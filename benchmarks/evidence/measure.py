"""Trains one arm with one seed, measures it, and writes the record that the tables are made from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import posttrain
from benchmarks.evidence.arms import MODEL, recipe
from benchmarks.evidence.bias import errors, held_out
from benchmarks.evidence.identity import identity, is_made
from posttrain import Evaluation, Recipe, RunResult
from posttrain.evaluation.evaluate import evaluate
from posttrain.policy import Policy
from posttrain.stages.artifact import open_artifact, open_sampler
from posttrain.support.files import write
from posttrain.support.records import read_rows

SAMPLING_STEPS = {5: 240, 10: 240, 20: 480, 40: 240}
"""Numbers of sampling steps, and how many images each is measured on: the first so many of the same prompts
and noises. Claims are made from those of 20 steps."""
PROMPTS = {"type": "shapes", "count": max(SAMPLING_STEPS.values()), "seed": 2026}
"""No choice of a setting was made on these draws. What is held out is the noise: Shapes has few prompts, most
of them captions of training images too, and so many samples have nearly all of them."""
EVALUATION = {
    "prompts": PROMPTS, "rewards": ["shapes"], "resolution": 64, "guidance": 2.0, "batch_size": 60, "grid": 1,
}  # fmt: skip
SCENES = {"count": 64, "seed": 2027}
"""Images at which the exposure bias is measured; none is of the training, though their captions are."""
ROLLOUTS = ((1, 2.0), (5, 2.0), (5, 1.0))
"""Steps and guidance by which the model leads itself, on the grid of 20 steps."""


def arm_identity(name: str, steps: int | None, samples: int | None) -> dict[str, Any]:
    """By what the record of an arm, or of ``base``, is made. Raises as :func:`recipe` does."""
    measures = {"evaluation": EVALUATION, "steps": SAMPLING_STEPS, "scenes": SCENES, "rollouts": ROLLOUTS}
    recipes = [] if name == "base" else [recipe(name, 0, steps)]
    return identity(recipes, {**measures, "samples": samples})


def measured(
    name: str, seed: int, runs: Path, records: Path, *, steps: int | None = None, samples: int | None = None
) -> Path:
    """The record of an arm, or of ``base``. What exists is kept: a stopped call goes on where it was.

    ``runs`` gets the run's folder, which is removed once it is measured; ``records`` the record. ``steps``
    shortens training and ``samples`` the evaluation, for a trial. ``seed`` is that of the training and of the
    evaluation's noise: arms are paired by both, and the noise's chance averages out over seeds. Raises
    PosttrainError if there is a record by other settings.
    """
    record, by = records / f"{name}-{seed}.json", arm_identity(name, steps, samples)
    if is_made(record, by):
        return record
    device = device_of_this_machine()
    about: dict[str, Any] = {"arm": name, "seed": seed, "identity": by, "cost": {}}
    if name == "base":
        folder, weights = runs / f"base-{seed}", MODEL["path"]
    else:
        training = recipe(name, seed, steps)
        folder = runs / folder_name(name, training)
        result = posttrain.run(training, output=folder)
        about["cost"], weights = cost(result, "trained"), str(result.final("trained"))
    started, settings = time.perf_counter(), {**EVALUATION, "seed": seed}
    about["evaluations"] = {}
    for n, count in SAMPLING_STEPS.items():
        prompts = {**PROMPTS, "count": count}
        found = scored(
            weights, {**settings, "steps": n, "prompts": prompts}, samples, folder / f"eval-{n}", device
        )
        about["evaluations"][str(n)] = found.pop("scores")
        about |= {key: max(about.get(key, []), of, key=len) for key, of in found.items()}
    model, _ = open_artifact(weights, device)
    latents, captions = held_out(model, min(SCENES["count"], samples or SCENES["count"]), SCENES["seed"])
    sigmas = model.sigmas(20, 64, 64)
    bias = errors(Policy(model), latents, captions, sigmas=sigmas, rollouts=ROLLOUTS, seed=seed)
    about["exposure_bias"] = {"captions": captions, **bias}
    about["measuring_seconds"] = round(time.perf_counter() - started, 1)
    keep(record, about)
    shutil.rmtree(folder, ignore_errors=True)
    return record


def folder_name(name: str, training: Recipe) -> str:
    """The folder of a run. It has the length, since a run would go on from a shorter one of its folder."""
    return f"{name}-{training.seed}-{training.stages[0].train.steps}-steps"


def keep(record: Path, about: Mapping[str, Any]) -> None:
    """Write the record, with the day and the device."""
    device = device_of_this_machine()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    record.parent.mkdir(parents=True, exist_ok=True)
    content = {**about, "date": date.today().isoformat(), "device": where}
    write(record, json.dumps(content, separators=(",", ":")))


def cost(result: RunResult, stage: str) -> dict[str, float]:
    """What the stage counted: optimizer steps, samples, forward-equivalents and seconds."""
    of = result.cost(stage)
    return {key: of[key] for key in ("steps", "samples", "forward_equivalents", "seconds")}


def device_of_this_machine() -> torch.device:
    """The GPU if there is one, as a run takes it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scored(
    weights: str, settings: Mapping[str, Any], samples: int | None, folder: Path, device: torch.device
) -> dict[str, Any]:
    """``prompts`` and ``tags`` of every sample, in the order of the prompts, and ``scores``, a list for each
    name.

    Where a prompt has several images, the score ``distance`` is an image's mean distance from the others of
    its prompt: the root of the mean squared difference of pixels in [0, 1]. It falls as samples grow alike.
    """
    count = samples or settings["prompts"]["count"]
    evaluation = Evaluation.model_validate({**settings, "prompts": {**settings["prompts"], "count": count}})
    sampler, which = open_sampler(weights, device, evaluation)
    evaluate(sampler, evaluation, folder, name=folder.name, weights=which, console=Console(quiet=True))
    rows = read_rows(folder / "records.jsonl")
    scores = {name: [round(row["scores"][name], 4) for row in rows] for name in sorted(rows[0]["scores"])}
    if evaluation.images_per_prompt > 1:
        scores["distance"] = _distances(rows, folder)
    prompts, tags = ([row[key] for row in rows] for key in ("prompt", "tag"))
    return {"prompts": prompts, "tags": tags, "scores": scores}


def _distances(rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """The mean distance of each image from the others of its prompt."""
    import numpy as np
    from PIL import Image

    images = [np.asarray(Image.open(folder / row["image"]), float) / 255 for row in rows]
    found: list[list[float]] = [[] for _ in rows]
    alike: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(row["prompt"], []).append(i)
    for of_prompt in alike.values():
        for i, j in combinations(of_prompt, 2):
            distance = float(np.sqrt(np.square(images[i] - images[j]).mean()))
            found[i].append(distance)
            found[j].append(distance)
    return [round(sum(each) / len(each), 4) for each in found]
