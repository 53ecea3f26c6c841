"""How good is a model? Prompts and scorers in; one record a sample, means with intervals, and images out.

The samples are cut into batches by their number alone. Each batch is published when it is done, so a
killed evaluation goes on, and several processes share one, to the same result.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.prompts import prompt_rows
from posttrain.errors import DataError, PosttrainError
from posttrain.evaluation.card import card, differing, result
from posttrain.scoring.batches import numbered, scored, scorers_of, shown_of
from posttrain.support.files import locked, published, write
from posttrain.support.images import save_image, to_pil
from posttrain.support.progress import stage_progress
from posttrain.support.wording import no_multiple

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.model import Sampler
    from posttrain.recipe.schema import Evaluation
    from posttrain.reward import Scorer
    from posttrain.scoring.batches import Row

CARD, RECORDS, CLAIM, PARTS = "eval.json", "records.jsonl", "claim.json", "parts"
LOCK = ".lock"
"""Held to look at the folder's state or change it."""


def evaluate(
    sampler: Sampler,
    evaluation: Evaluation,
    folder: Path,
    *,
    name: str,
    weights: str,
    console: Console,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any] | None:
    """Sample every prompt, score every sample, and write ``folder``: records, result card, images.

    ``weights`` says which weights these are ("base", "raw" or "ema"). This process measures the batches
    ``rank``, ``rank + world``, ... Every sample is counted once; a reward that fails stops the evaluation
    (RewardError). Goes on with what an earlier try left; raises PosttrainError where ``folder`` holds
    something else. Returns the result card, or None where other processes are still at it.
    """
    if evaluation.resolution % sampler.divisor:
        words = no_multiple(evaluation.resolution, sampler.divisor)
        raise DataError(f"evaluation.resolution: {words}")
    rows = prompt_rows(evaluation.prompts, evaluation.rewards)
    samples = numbered(rows, evaluation.images_per_prompt)
    described = card(sampler, evaluation, rows, weights)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK):
        if (before := _claimed(folder, described)) is not None:
            return before
    batches = range(-(-len(samples) // evaluation.batch_size))
    mine, size = batches[rank::world], evaluation.batch_size
    sizes = [len(samples[b * size : (b + 1) * size]) for b in mine]
    if not all(_part(folder, b).is_dir() for b in mine):
        scorers = scorers_of(evaluation.rewards, sampler.device)
        shown = shown_of(samples, evaluation.grid)
        with stage_progress(f"evaluate {name}", sum(sizes), 0, console) as bar:
            for i, b in enumerate(mine):
                with _taken(folder, b) as free:
                    if free:
                        _measure(sampler, evaluation, folder, samples, b, scorers, shown)
                bar.update(sum(sizes[: i + 1]))
    with locked(folder / LOCK):  # of several processes, the last to finish puts the parts together
        if (before := _finished(folder)) is not None:
            return before
        if not all(_part(folder, b).is_dir() for b in batches):
            return None
        return _merged(folder, evaluation, described, samples, len(batches))


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
    ((records, images),) = scored(sampler, evaluation, chunk, scorers)
    with published(_part(folder, batch)) as part:
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


def _merged(
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
            target.unlink(missing_ok=True)
            try:
                target.hardlink_to(file)
            except OSError:  # a file system without links
                shutil.copyfile(file, target)
    shown = shown_of(samples, evaluation.grid)
    write(folder / RECORDS, "".join(json.dumps(record) + "\n" for record in records))
    found = {
        **described,
        **result(records, evaluation.rewards),
        "forward_equivalents": sum(cost["forward_equivalents"] for cost in costs),
        "seconds": sum(cost["seconds"] for cost in costs),
        "grid_prompts": [samples[i][0]["prompt"] for i in shown],
    }
    write(folder / CARD, json.dumps(found, indent=2))
    _clean(folder)
    return found


def _claimed(folder: Path, described: Row) -> dict[str, Any] | None:
    """The result card, if the folder holds this very evaluation finished; else claim the folder for it."""
    for file in (folder / CARD, folder / CLAIM):
        if not file.is_file():
            continue
        found = json.loads(file.read_text())
        if names := differing(found, described):
            raise PosttrainError(
                f"{str(folder)!r} holds another evaluation; it differs in: {'; '.join(names)}. "
                "Give another folder, or remove this one"
            )
        return _finished(folder)
    if others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
        if "summary.json" in others:
            words = "an evaluation of an earlier version; remove it to evaluate anew"
        else:
            words = f"something else than an evaluation ({', '.join(others[:3])}); give another folder"
        raise PosttrainError(f"{str(folder)!r} holds {words}")
    write(folder / CLAIM, json.dumps(described, indent=2))
    return None


def _finished(folder: Path) -> dict[str, Any] | None:
    """The result card, if it is written; what a kill just after that left is removed."""
    if not (folder / CARD).is_file():
        return None
    _clean(folder)
    return json.loads((folder / CARD).read_text())


def _clean(folder: Path) -> None:
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / CLAIM).unlink(missing_ok=True)


@contextlib.contextmanager
def _taken(folder: Path, batch: int) -> Iterator[bool]:
    """Whether the batch is this process's to measure: neither done, nor at hand in another process."""
    with contextlib.ExitStack() as held:
        with locked(folder / LOCK):
            free = not (folder / CARD).is_file()
            if free:
                file = folder / PARTS / f".{batch:06d}.lock"
                free = held.enter_context(locked(file, wait=False)) and not _part(folder, batch).is_dir()
        yield free


def _part(folder: Path, batch: int) -> Path:
    return folder / PARTS / f"{batch:06d}"
