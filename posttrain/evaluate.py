"""How good is a model? Prompts and scorers in; one record a sample, means with intervals, and images out."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.checkpoint import published
from posttrain.data.prompts import prompt_rows
from posttrain.errors import DataError
from posttrain.grids import to_pil
from posttrain.policy import Policy
from posttrain.progress import stage_progress
from posttrain.reward import checked
from posttrain.sampling import sample_images
from posttrain.statistics import bootstrap_interval

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from posttrain.model import FlowModel
    from posttrain.recipe import Evaluation
    from posttrain.reward import Reward, Scorer

Row = Mapping[str, Any]


def evaluate(
    policy: Policy, evaluation: Evaluation, folder: Path, *, name: str, weights: str, console: Console
) -> dict[str, Any]:
    """Sample every prompt, score every sample, and publish ``folder`` (records, summary, images) at once.

    ``weights`` says which weights these are ("base", "raw" or "ema"). Every sample is counted once; a
    reward that fails stops the evaluation (RewardError). Returns the summary.
    """
    model = policy.model
    if evaluation.resolution % model.divisor:
        low = evaluation.resolution // model.divisor * model.divisor
        near = " or ".join(str(r) for r in (low, low + model.divisor) if r)
        raise DataError(
            f"evaluation.resolution: {evaluation.resolution} is no multiple of the {model.divisor} pixels "
            f"that this model needs; the nearest are {near}"
        )
    samples = numbered(prompt_rows(evaluation.prompts, evaluation.rewards), evaluation.images_per_prompt)
    shown = _shown(samples, evaluation.grid)
    spent, started, records = policy.forward_equivalents, time.monotonic(), []
    with published(folder) as part, stage_progress(f"evaluate {name}", len(samples), 0, console) as bar:
        (part / "grid").mkdir()
        for found, images in scored(policy, evaluation, samples, scorers_of(evaluation, model)):
            for i, image in enumerate(to_pil(images), len(records)):
                if i in shown:
                    image.save(part / "grid" / f"{shown[i]:03d}.png")
            records += found
            bar.update(len(records))
        summary = {
            "images": len(records),
            "prompts": len({record["prompt"] for record in records}),
            "sampler": evaluation.model_dump(exclude={"prompts", "rewards", "grid"}),
            "weights": weights,
            "scores": summaries(records, evaluation.rewards),
            "tags": {
                tag: summaries([r for r in records if r["tag"] == tag], evaluation.rewards)
                for tag in dict.fromkeys(r["tag"] for r in records if r["tag"] is not None)
            },
            "forward_equivalents": policy.forward_equivalents - spent,
            "seconds": time.monotonic() - started,
            "grid_prompts": [samples[i][0]["prompt"] for i in shown],
        }
        (part / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (part / "summary.json").write_text(json.dumps(summary, indent=2))
    policy.forward_equivalents = spent
    return summary


def scorers_of(evaluation: Evaluation, model: FlowModel) -> dict[str, Scorer]:
    """The evaluation's rewards, loaded, by name."""
    return {r.label: checked(r.label, r.load(model.device)) for r in evaluation.rewards}


def scored(
    policy: Policy,
    evaluation: Evaluation,
    samples: Sequence[tuple[Row, int]],
    scorers: Mapping[str, Scorer],
) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
    """Records and images (n, 3, h, w) of the samples, (prompt row, image index), a batch at a time."""
    for start in range(0, len(samples), evaluation.batch_size):
        chunk = samples[start : start + evaluation.batch_size]
        rows = [row for row, _ in chunk]
        prompts = [row["prompt"] for row in rows]
        images = sample_images(
            policy,
            prompts,
            [index for _, index in chunk],
            resolution=evaluation.resolution,
            steps=evaluation.steps,
            guidance=evaluation.guidance,
            solver=evaluation.solver,
            seed=evaluation.seed,
        ).cpu()
        scores = {name: score(images, prompts, rows) for name, score in scorers.items()}
        records = []
        for i, (row, index) in enumerate(chunk):
            values = {}
            for name, result in scores.items():
                values[name] = float(result.value[i])
                values |= {f"{name}/{detail}": float(v[i]) for detail, v in result.details.items()}
            records.append({"prompt": row["prompt"], "index": index, "tag": row.get("tag"), "scores": values})
        yield records, images


def numbered(rows: Sequence[Row], images_per_prompt: int) -> list[tuple[Row, int]]:
    """(row, image index) of every sample; a prompt that comes again goes on counting its images."""
    seen: Counter[str] = Counter()
    samples = []
    for row in rows:
        for _ in range(images_per_prompt):
            samples.append((row, seen[row["prompt"]]))
            seen[row["prompt"]] += 1
    return samples


def _shown(samples: Sequence[tuple[Row, int]], count: int) -> dict[int, int]:
    """Sample -> place in the grid: first images of prompts, taking each tag in turn."""
    by_tag: dict[Any, list[int]] = {}
    for i, (row, index) in enumerate(samples):
        if index == 0:
            by_tag.setdefault(row.get("tag"), []).append(i)
    turns = max((len(v) for v in by_tag.values()), default=0)
    order = [v[turn] for turn in range(turns) for v in by_tag.values() if turn < len(v)]
    return {sample: place for place, sample in enumerate(order[:count])}


def summaries(records: Sequence[Row], rewards: Sequence[Reward]) -> dict[str, dict[str, Any]]:
    """Each score's mean, its interval (prompts are resampled, or the images of a single one), and its
    direction."""
    groups = np.unique([record["prompt"] for record in records], return_inverse=True)[1]
    if not groups.any():
        groups = None  # drawing the one prompt again and again would make an interval of no width
    found = {}
    for name in records[0]["scores"]:
        reward = next(r for r in rewards if r.label == name.split("/")[0])
        values = np.array([record["scores"][name] for record in records])
        low, high = bootstrap_interval(values, groups=groups)
        found[name] = {
            "mean": float(values.mean()),
            "low": low,
            "high": high,
            "count": len(values),
            "higher_is_better": reward.higher_is_better,
        }
    return found
