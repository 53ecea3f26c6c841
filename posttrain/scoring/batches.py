"""Draws samples for a list of prompts and scores them, one batch at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.reward import checked
from posttrain.scoring.limited import limited

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.recipe.schema import Evaluation
    from posttrain.reward import Reward, Scorer
    from posttrain.sampler import Sampler

Row = Mapping[str, Any]
"""A row of a prompt file: ``prompt`` and its metadata."""
Sample = tuple[Row, int]
"""A prompt's row, and the number of the image among the images of that prompt, from 0."""


def load_scorers(rewards: Sequence[Reward], device: torch.device) -> dict[str, Scorer]:
    """Load ``rewards`` on ``device``; return their checked scoring functions, with time limits, by label."""
    return {r.label: checked(r.label, limited(r, r.load(device), device)) for r in rewards}


def draw_and_score(
    sampler: Sampler,
    evaluation: Evaluation,
    samples: Sequence[Sample],
    scorers: Mapping[str, Scorer],
) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
    """Draw and score ``samples``; yield each batch's records and images (n, 3, h, w) in [0, 1], on the CPU.

    Raises RewardError if a score cannot be computed.
    """
    for start in range(0, len(samples), evaluation.batch_size):
        batch = samples[start : start + evaluation.batch_size]
        rows = [row for row, _ in batch]
        prompts = [row["prompt"] for row in rows]
        images = sampler.images(prompts, [index for _, index in batch], evaluation).cpu()
        scores = {name: score(images, prompts, rows) for name, score in scorers.items()}
        records = []
        for i, (row, index) in enumerate(batch):
            values = {k: v for name, of in scores.items() for k, v in of.named(name, i).items()}
            records.append({"prompt": row["prompt"], "index": index, "tag": row.get("tag"), "scores": values})
        yield records, images


def samples_of(rows: Sequence[Row], images_per_prompt: int) -> list[Sample]:
    """Every sample of ``rows``, in order. A prompt that stands in several rows numbers its images on."""
    images_so_far: Counter[str] = Counter()
    samples = []
    for row in rows:
        for _ in range(images_per_prompt):
            samples.append((row, images_so_far[row["prompt"]]))
            images_so_far[row["prompt"]] += 1
    return samples


def grid_positions(samples: Sequence[Sample], count: int) -> dict[int, int]:
    """Index of a sample -> its position in the image grid of ``count`` images.

    The grid shows only the first image of a prompt, and takes the tags in turn.
    """
    by_tag: dict[Any, list[int]] = {}
    for i, (row, index) in enumerate(samples):
        if index == 0:
            by_tag.setdefault(row.get("tag"), []).append(i)
    turns = max((len(v) for v in by_tag.values()), default=0)
    order = [v[turn] for turn in range(turns) for v in by_tag.values() if turn < len(v)]
    return {sample: position for position, sample in enumerate(order[:count])}
