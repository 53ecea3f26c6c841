"""How good is a model? Prompts and scorers in; one record a sample, means with intervals, and images out.

The samples are cut into batches by their number alone. Each batch is published when it is done, so a
killed evaluation goes on, and several processes (``RANK`` of ``WORLD_SIZE``) share one, to the same result.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.card import card, differing, result
from posttrain.checkpoint import published
from posttrain.data.prompts import prompt_rows
from posttrain.errors import DataError, PosttrainError
from posttrain.grids import save_image, to_pil
from posttrain.progress import stage_progress
from posttrain.scoring import numbered, scored, scorers_of, shown_of

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.recipe import Evaluation
    from posttrain.reward import Scorer
    from posttrain.sampling import Sampler
    from posttrain.scoring import Row

CARD, RECORDS, CLAIM, PARTS = "eval.json", "records.jsonl", "claim.json", "parts"


def evaluate(
    sampler: Sampler, evaluation: Evaluation, folder: Path, *, name: str, weights: str, console: Console
) -> dict[str, Any] | None:
    """Sample every prompt, score every sample, and write ``folder``: records, result card, images.

    ``weights`` says which weights these are ("base", "raw" or "ema"). Every sample is counted once; a
    reward that fails stops the evaluation (RewardError). Goes on with what an earlier try left; raises
    PosttrainError where ``folder`` holds something else. Returns the result card, or None where other
    processes are still at it.
    """
    if evaluation.resolution % sampler.divisor:
        low = evaluation.resolution // sampler.divisor * sampler.divisor
        near = " or ".join(str(r) for r in (low, low + sampler.divisor) if r)
        raise DataError(
            f"evaluation.resolution: {evaluation.resolution} is no multiple of the {sampler.divisor} pixels "
            f"that this model needs; the nearest are {near}"
        )
    rows = prompt_rows(evaluation.prompts, evaluation.rewards)
    samples = numbered(rows, evaluation.images_per_prompt)
    described = card(sampler, evaluation, rows, weights)
    if (before := _claimed(folder, described)) is not None:
        return before
    batches = range(-(-len(samples) // evaluation.batch_size))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    missing = [b for b in batches[rank::world] if not _part(folder, b).is_dir()]
    if missing:
        scorers = scorers_of(evaluation.rewards, sampler.device)
        shown = shown_of(samples, evaluation.grid)
        mine = len(batches[rank::world]) * evaluation.batch_size
        done = min(mine, len(samples)) - len(missing) * evaluation.batch_size
        with stage_progress(f"evaluate {name}", min(mine, len(samples)), max(done, 0), console) as bar:
            for b in missing:
                _measure(sampler, evaluation, folder, samples, b, scorers, shown)
                done += evaluation.batch_size
                bar.update(max(min(done, mine, len(samples)), 0))
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, the last to finish puts the parts together
        if (folder / CARD).is_file():
            return json.loads((folder / CARD).read_text())
        if not all(_part(folder, b).is_dir() for b in batches):
            return None
        return _finish(folder, evaluation, described, samples, len(batches))


def _measure(
    sampler: Sampler,
    evaluation: Evaluation,
    folder: Path,
    samples: Sequence[tuple[Row, int]],
    batch: int,
    scorers: Mapping[str, Scorer],
    shown: Mapping[int, int],
) -> None:
    """Sample and score one batch, and publish it."""
    first, started, spent = batch * evaluation.batch_size, time.monotonic(), sampler.forward_equivalents
    chunk = samples[first : first + evaluation.batch_size]
    with published(_part(folder, batch)) as part:
        ((records, images),) = scored(sampler, evaluation, chunk, scorers)
        for i, (record, image) in enumerate(zip(records, to_pil(images), strict=True), first):
            if i in shown:
                (part / "grid").mkdir(exist_ok=True)
                image.save(part / "grid" / f"{shown[i]:03d}.png")
            if evaluation.keep != "grid":
                (part / "images").mkdir(exist_ok=True)
                file = save_image(image, part / "images", i, record, evaluation.keep)
                record["image"] = f"images/{file.name}"
        cost = {
            "seconds": time.monotonic() - started,
            "forward_equivalents": sampler.forward_equivalents - spent,
        }
        (part / "cost.json").write_text(json.dumps(cost))
        (part / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))


def _finish(
    folder: Path, evaluation: Evaluation, described: Row, samples: Sequence[tuple[Row, int]], batches: int
) -> dict[str, Any]:
    """Put the parts together; what is there already, from a try that was killed here, is overwritten."""
    records, costs = [], []
    for b in range(batches):
        part = _part(folder, b)
        records += [json.loads(line) for line in (part / RECORDS).read_text().splitlines()]
        costs.append(json.loads((part / "cost.json").read_text()))
        for file in (*part.glob("grid/*"), *part.glob("images/*")):
            target = folder / file.relative_to(part)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    shown = shown_of(samples, evaluation.grid)
    (folder / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))
    found = {
        **described,
        **result(records, evaluation.rewards),
        "forward_equivalents": sum(cost["forward_equivalents"] for cost in costs),
        "seconds": sum(cost["seconds"] for cost in costs),
        "grid_prompts": [samples[i][0]["prompt"] for i in shown],
    }
    part = folder / f".{CARD}.part"
    part.write_text(json.dumps(found, indent=2))
    part.rename(folder / CARD)
    shutil.rmtree(folder / PARTS)
    (folder / CLAIM).unlink()
    return found


def _claimed(folder: Path, described: Row) -> dict[str, Any] | None:
    """The result card, if the folder holds this very evaluation finished; else claim the folder for it."""
    for file in (folder / CARD, folder / CLAIM):
        if file.is_file():
            found = json.loads(file.read_text())
            if names := differing(found, described):
                raise PosttrainError(
                    f"{str(folder)!r} holds another evaluation; it differs in: {'; '.join(names)}. "
                    "Give another folder, or remove this one"
                )
            return found if file.name == CARD else None
    if folder.exists() and any(folder.iterdir()):
        raise PosttrainError(f"{str(folder)!r} holds something else than an evaluation; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{CLAIM}.{os.getpid()}"
    part.write_text(json.dumps(described, indent=2))
    part.rename(folder / CLAIM)
    return None


def _part(folder: Path, batch: int) -> Path:
    return folder / PARTS / f"{batch:06d}"
