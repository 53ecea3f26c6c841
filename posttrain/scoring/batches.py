"""What do samples of a list of prompts score? Drawn and scored a batch at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.reward import checked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.model import Sampler
    from posttrain.recipe.schema import Evaluation
    from posttrain.reward import Reward, Scorer

Row = Mapping[str, Any]


def scorers_of(rewards: Sequence[Reward], device: torch.device) -> dict[str, Scorer]:
    """The scoring functions of ``rewards``, loaded, by name."""
    return {r.label: checked(r.label, r.load(device)) for r in rewards}


def scored(
    sampler: Sampler,
    evaluation: Evaluation,
    samples: Sequence[tuple[Row, int]],
    scorers: Mapping[str, Scorer],
) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
    """Records and images (n, 3, h, w) of the samples, (prompt row, image index), a batch at a time."""
    for start in range(0, len(samples), evaluation.batch_size):
        chunk = samples[start : start + evaluation.batch_size]
        rows = [row for row, _ in chunk]
        prompts = [row["prompt"] for row in rows]
        images = sampler.images(prompts, [index for _, index in chunk], evaluation).cpu()
        scores = {name: score(images, prompts, rows) for name, score in scorers.items()}
        records = []
        for i, (row, index) in enumerate(chunk):
            values = {k: v for name, found in scores.items() for k, v in found.named(name, i).items()}
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


def shown_of(samples: Sequence[tuple[Row, int]], count: int) -> dict[int, int]:
    """Sample -> place in the grid: first images of prompts, taking each tag in turn."""
    by_tag: dict[Any, list[int]] = {}
    for i, (row, index) in enumerate(samples):
        if index == 0:
            by_tag.setdefault(row.get("tag"), []).append(i)
    turns = max((len(v) for v in by_tag.values()), default=0)
    order = [v[turn] for turn in range(turns) for v in by_tag.values() if turn < len(v)]
    return {sample: place for place, sample in enumerate(order[:count])}
