"""Evaluates a model: samples prompts, scores the samples, and writes records, a result card and images.

The samples are cut into batches, the same for any number of processes. Each batch is published when it is
measured. So a killed evaluation continues where it stopped, and several processes can share one; the result
is the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.prompts import prompt_rows
from posttrain.errors import DataError
from posttrain.evaluation.card import card, result
from posttrain.evaluation.parts import (
    COST,
    LOCK,
    RECORDS,
    Occupied,
    at_work,
    claim,
    finished,
    merge_parts,
    part,
    taken,
    write_card,
)
from posttrain.scoring.batches import draw_and_score, grid_positions, load_scorers, samples_of
from posttrain.support.files import locked, published
from posttrain.support.images import save_image, to_pil
from posttrain.support.progress import stage_progress
from posttrain.support.terminal import note
from posttrain.support.wording import no_multiple

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.recipe.schema import Evaluation
    from posttrain.reward import Scorer
    from posttrain.sampler import Sampler
    from posttrain.scoring.batches import Sample


@dataclass(frozen=True)
class Share:
    """The batches that one process measures: number ``rank``, ``rank + world_size``, and so on."""

    rank: int = 0
    world_size: int = 1


def evaluate(
    sampler: Sampler,
    evaluation: Evaluation,
    folder: Path,
    *,
    name: str,
    weights: str,
    console: Console,
    share: Share = Share(),
) -> dict[str, Any] | None:
    """Sample every prompt, score every sample, and write records, result card and images to ``folder``.

    ``weights`` says which weights the sampler has ("base", "raw" or "ema"); ``name`` is shown beside the
    progress bar. This process measures the batches of its ``share`` that are not measured yet. Returns the
    result card, or None if other processes still have batches to measure.

    Raises DataError if the resolution does not fit the model, RewardError if a reward fails, and
    PosttrainError if ``folder`` holds anything but this evaluation, or another one that measured nothing.
    """
    draft, work = _prepared(sampler, evaluation, folder, weights)
    return _evaluated(work, draft, share, name, console)


def evaluate_apart(
    sampler: Sampler,
    evaluation: Evaluation,
    folder: Path,
    *,
    weights: str,
    console: Console,
    share: Share = Share(),
) -> tuple[Path, dict[str, Any] | None]:
    """As :func:`evaluate`, into the first of ``folder``, ``folder-2``, ``folder-3`` and so on that holds this
    evaluation or nothing. Returns the folder too."""
    draft, work = _prepared(sampler, evaluation, folder, weights)
    for number in itertools.count(2):
        try:
            return work.folder, _evaluated(work, draft, share, work.folder.name, console)
        except Occupied:
            work = replace(work, folder=folder.with_name(f"{folder.name}-{number}"))
    raise AssertionError("the numbers do not end")


def _prepared(
    sampler: Sampler, evaluation: Evaluation, folder: Path, weights: str
) -> tuple[dict[str, Any], _Work]:
    """The card without results, and the work. Raises DataError."""
    if evaluation.resolution % sampler.divisor:
        problem = no_multiple(evaluation.resolution, sampler.divisor)
        raise DataError(f"evaluation.resolution: {problem}")
    rows = prompt_rows(evaluation.prompts, evaluation.rewards)
    work = _Work(sampler, evaluation, folder, samples_of(rows, evaluation.images_per_prompt))
    draft = card(sampler, evaluation, rows, weights)
    draft["model"]["base"] = dict(sampler.base())
    return draft, work


def _evaluated(
    work: _Work, draft: Mapping[str, Any], share: Share, name: str, console: Console
) -> dict[str, Any] | None:
    """Claim the folder and measure this process's share. Raises Occupied if the folder holds something
    else."""
    folder = work.folder
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as working:
        with locked(folder / LOCK):
            if (before := claim(folder, draft, partial(note, console))) is not None:
                return before
            working.enter_context(at_work(folder))
        _measure_share(work, share, name, console)
        with locked(folder / LOCK):
            if (before := finished(folder)) is not None:
                return before
            if not all(part(folder, batch).is_dir() for batch in work.batches):
                return None
            return _finish(work, draft)


@dataclass(frozen=True)
class _Work:
    """The sampler and settings of an evaluation, its samples, and the folder of its results."""

    sampler: Sampler
    evaluation: Evaluation
    folder: Path
    samples: Sequence[Sample]

    @property
    def batches(self) -> range:
        """The numbers of the batches."""
        return range(-(-len(self.samples) // self.evaluation.batch_size))

    @property
    def grid(self) -> dict[int, int]:
        """Index of a sample -> its position in the image grid."""
        return grid_positions(self.samples, self.evaluation.grid)

    def samples_in(self, batch: int) -> Sequence[Sample]:
        """The samples of one batch."""
        size = self.evaluation.batch_size
        return self.samples[batch * size : (batch + 1) * size]


def _measure_share(work: _Work, share: Share, name: str, console: Console) -> None:
    """Measure the batches of ``share`` that neither this nor another process has measured."""
    batches = work.batches[share.rank :: share.world_size]
    if all(part(work.folder, batch).is_dir() for batch in batches):
        return
    scorers, grid = load_scorers(work.evaluation.rewards, work.sampler.device), work.grid
    sizes = [len(work.samples_in(batch)) for batch in batches]
    with stage_progress(f"evaluate {name}", sum(sizes), 0, console) as bar:
        for i, batch in enumerate(batches):
            with taken(work.folder, batch) as free:
                if free:
                    _measure(work, batch, scorers, grid)
            bar.update(sum(sizes[: i + 1]))


def _measure(work: _Work, batch: int, scorers: Mapping[str, Scorer], grid: Mapping[int, int]) -> None:
    """Sample and score one batch, and publish it."""
    sampler, evaluation = work.sampler, work.evaluation
    started, spent = time.monotonic(), sampler.forward_equivalents
    ((records, images),) = draw_and_score(sampler, evaluation, work.samples_in(batch), scorers)
    with published(part(work.folder, batch)) as folder:
        first = batch * evaluation.batch_size
        for i, (record, image) in enumerate(zip(records, to_pil(images), strict=True), first):
            if i in grid:
                (folder / "grid").mkdir(exist_ok=True)
                image.save(folder / "grid" / f"{grid[i]:03d}.png")
            if evaluation.keep != "grid":
                (folder / "images").mkdir(exist_ok=True)
                file = save_image(image, folder / "images", i, record, evaluation.keep)
                record["image"] = f"images/{file.name}"
        cost = {
            "seconds": time.monotonic() - started,
            "forward_equivalents": sampler.forward_equivalents - spent,
        }
        (folder / COST).write_text(json.dumps(cost), "utf-8")
        (folder / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def _finish(work: _Work, draft: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the parts, and write the result card."""
    records, cost = merge_parts(work.folder, [len(work.samples_in(batch)) for batch in work.batches])
    finished_card = {
        **draft,
        **result(records, work.evaluation.rewards),
        **cost,
        "grid_prompts": [work.samples[i][0]["prompt"] for i in work.grid],
    }
    write_card(work.folder, finished_card)
    return finished_card
