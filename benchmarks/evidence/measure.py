"""Trains one arm with one seed, measures it, and writes the record that the tables are made from."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import posttrain
from benchmarks.evidence.arms import recipe
from benchmarks.evidence.bias import errors, held_out
from posttrain import Evaluation
from posttrain.evaluation.evaluate import evaluate
from posttrain.policy import Policy
from posttrain.stages.artifact import open_artifact, open_sampler
from posttrain.support.files import write

BASE_MODEL = "posttrain/tiny-sd3"
GUIDANCE, SAMPLING_STEPS = 2.0, (5, 10, 20, 40)
PROMPTS = {"type": "shapes", "count": 480, "seed": 2026}
"""Held-out prompts: no choice of a setting was made on this seed."""
SCENES, SCENES_SEED = 96, 2027
"""Held-out images at which the exposure bias is measured."""


def measured(
    name: str, seed: int, runs: Path, records: Path, *, steps: int | None = None, samples: int | None = None
) -> Path:
    """The record of an arm, or of ``base``. What exists is kept: a stopped call goes on where it was.

    ``runs`` gets the run's folder, which is removed once it is measured; ``records`` the record. ``steps``
    shortens training and ``samples`` the evaluation, for a trial.
    """
    record = records / f"{name}-{seed}.json"
    if record.exists():
        return record
    folder, device = runs / f"{name}-{seed}", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about: dict[str, Any] = {"arm": name, "seed": seed, "base": _base_print()}
    if name == "base":
        weights = BASE_MODEL
    else:
        result = posttrain.run(recipe(name, seed, steps), output=folder)
        cost = result.cost("trained")
        about["cost"] = {key: cost[key] for key in ("steps", "samples", "forward_equivalents", "seconds")}
        weights = str(result.final("trained"))
    started = time.perf_counter()
    about["evaluations"] = {
        str(n): _scores(weights, n, samples, folder / f"eval-{n}", device) for n in SAMPLING_STEPS
    }
    model, _ = open_artifact(weights, device)
    latents, captions = held_out(model, min(SCENES, samples or SCENES), SCENES_SEED)
    sigmas = model.sigmas(20, 64, 64)
    about["exposure_bias"] = {
        str(k): errors(Policy(model), latents, captions, sigmas=sigmas, steps=k, guidance=GUIDANCE)
        for k in (1, 5)
    }
    about["measuring_seconds"] = round(time.perf_counter() - started, 1)
    records.mkdir(parents=True, exist_ok=True)
    write(record, json.dumps(about, separators=(",", ":")))
    shutil.rmtree(folder, ignore_errors=True)
    return record


def _scores(
    weights: str, steps: int, samples: int | None, folder: Path, device: torch.device
) -> dict[str, Any]:
    """The scores of every sample by name, in the order of ``prompts``, beside the prompts and their kinds."""
    evaluation = Evaluation.model_validate(
        {
            "prompts": {**PROMPTS, "count": samples or PROMPTS["count"]},
            "rewards": ["shapes"],
            "resolution": 64,
            "steps": steps,
            "guidance": GUIDANCE,
            "batch_size": 60,
            "grid": 12,
        }
    )
    sampler, which = open_sampler(weights, device, evaluation)
    evaluate(sampler, evaluation, folder, name=folder.name, weights=which, console=Console(quiet=True))
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: (row["prompt"], row["index"]))
    names = sorted(rows[0]["scores"])
    return {
        "prompts": [row["prompt"] for row in rows],
        "tags": [row.get("tag", "") for row in rows],
        "scores": {name: [round(row["scores"][name], 4) for row in rows] for name in names},
    }


def _base_print() -> str:
    """The hash of the transformer that all arms start from, as its provenance has it."""
    from posttrain.weights.pipeline_folder import ASSETS

    made = json.loads((ASSETS / "tiny-sd3" / "provenance.json").read_text("utf-8"))
    return made["sha256"]["transformer/diffusion_pytorch_model.safetensors"]
