"""Says what a person wants to know of a stage's images before training: sizes, epochs, captions, copies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from posttrain.data.lines import Problem
from posttrain.data.loader import ImageSource
from posttrain.data.workers import Seen
from posttrain.support.wording import counted

if TYPE_CHECKING:
    from posttrain.data.table import Record
    from posttrain.model import Model
    from posttrain.recipe.schema import Stage

SHOWN = 8
"""Sizes listed in one line."""
MANY_EPOCHS = 300
"""More passes over the images than this are warned of. Training one subject on a few images takes 100 to
200."""
FULL_ENOUGH = 0.75
"""Part of its size that a batch has on average; below it, small buckets are warned of."""


def facts(
    stage: Stage, model: Model, sources: Sequence[ImageSource], seen: Sequence[Mapping[int, Seen]]
) -> tuple[list[str], list[str]]:
    """Lines on the images of ``stage``, and warnings.

    A sample has one image of each of ``sources``. ``seen`` has what is known of each image of a source that
    can be decoded.
    """
    first, sample = sources[0], "image" if len(sources) == 1 else "pair"
    told = [_sizes(first, sample), *_enlarged(sources, seen), *_epochs(stage, first, sample)]
    told += [*_captions(first, model), *_weights([first.records[i] for i in seen[0]], sample), *first.notes]
    # an image may be in many pairs
    copies = _copies(first, seen[0]) if len(sources) == 1 else ()
    return told, [*copies, *_warnings(stage, first, sample)]


def kinds(problems: Sequence[Problem]) -> str:
    """How many problems there are of each kind, the most frequent first."""
    found = Counter(_kind(problem.reason) for problem in problems)
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common(SHOWN))


def _kind(reason: str) -> str:
    """A reason without what differs between files: names, numbers, details."""
    reason = re.sub(r"\s*\([^()]*\)", "", reason).split(": ")[0].split(";")[0]  # a detail may have a colon
    return re.sub(r"\d[\d,]*", "N", reason)[:60]


def _sizes(source: ImageSource, sample: str) -> str:
    buckets = sorted(source.buckets.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = ", ".join(f"{width} x {height}: {len(ids)}" for (width, height), ids in buckets[:SHOWN])
    more = f", and {len(buckets) - SHOWN} more" if len(buckets) > SHOWN else ""
    return f"{counted(len(buckets), 'size')} (width x height: {sample}s): {shown}{more}"


def _enlarged(sources: Sequence[ImageSource], seen: Sequence[Mapping[int, Seen]]) -> Iterator[str]:
    """How many images have fewer pixels than they are trained at."""
    scales = []
    for source, known in zip(sources, seen, strict=True):
        for i, image in known.items():
            sides = zip(source.bucket_of[i], image.size, strict=True)
            if (scale := max(side / own for side, own in sides)) > 1:
                scales.append(scale)
    if scales:
        yield f"{counted(len(scales), 'image')} smaller than the size, enlarged up to {max(scales):.3g} times"


def _epochs(stage: Stage, source: ImageSource, sample: str) -> Iterator[str]:
    size = stage.train.batch_size
    batches = source.batches_per_epoch(size)
    mean = len(source.records) / batches
    per_batch = stage.train.steps_per_batch
    steps = counted(batches * per_batch, "step")
    yield (
        f"an epoch is {steps}: {counted(batches, 'batch') if batches == 1 else f'{batches} batches'} of "
        f"{mean:.3g} {sample}s on average (batch_size {size}); {counted(stage.train.steps, 'step')} are "
        f"{_number(_epochs_of(stage, source))} epochs"
    )


def _epochs_of(stage: Stage, source: ImageSource) -> float:
    per_epoch = source.batches_per_epoch(stage.train.batch_size) * stage.train.steps_per_batch
    return stage.train.steps / per_epoch


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _captions(source: ImageSource, model: Model) -> Iterator[str]:
    captions = list(dict.fromkeys(record.caption for record in source.records.values()))
    lengths = [len(caption) for caption in captions]
    different = f"{len(captions)} different captions" if len(captions) > 1 else "1 caption"
    yield f"{different}, of {min(lengths)} to {max(lengths)} characters"
    for name, tokens in model.token_counts(captions).items():
        cut = f"{counted(tokens.too_long, 'caption')} cut off" if tokens.too_long else "no caption cut off"
        yield f"{name} reads {tokens.limit} tokens: {cut}, the longest has {max(tokens.counts)}"


def _weights(records: Sequence[Record], sample: str) -> Iterator[str]:
    if weights := [record.extra["weight"] for record in records if "weight" in record.extra]:
        have = "has" if len(weights) == 1 else "have"
        yield f"{counted(len(weights), sample)} {have} a weight, from {min(weights):g} to {max(weights):g}"


def _copies(source: ImageSource, seen: Mapping[int, Seen]) -> Iterator[str]:
    """Images of equal bytes under several names."""
    places: dict[str, list[str]] = {}
    for i, image in seen.items():
        names = places.setdefault(image.sha256, [])
        if (name := str(source.records[i].image)) not in names:
            names.append(name)
    groups = [names for names in places.values() if len(names) > 1]
    if groups:
        extra = sum(len(names) - 1 for names in groups)
        shown = "; ".join(" = ".join(names[:3]) for names in groups[:3])
        yield f"{counted(extra, 'image')} with the bytes of another one: {shown}" + (
            "; ..." if len(groups) > 3 else ""
        )


def _warnings(stage: Stage, source: ImageSource, sample: str) -> Iterator[str]:
    count, size = len(source.records), stage.train.batch_size
    if (epochs := _epochs_of(stage, source)) > MANY_EPOCHS:
        yield (
            f"{counted(count, sample)} seen {_number(epochs)} times each: the model learns them by heart; "
            f"{MANY_EPOCHS} epochs are {_number(MANY_EPOCHS * stage.train.steps / epochs)} train.steps"
        )
    batches = source.batches_per_epoch(size)
    if count < FULL_ENOUGH * batches * size:
        smaller = sum(len(ids) % size > 0 for ids in source.buckets.values())
        yield (
            f"{smaller} of {batches} batches have fewer than {size} {sample}s, since a batch has images of "
            f"one size: a step trains on {count / batches:.3g} {sample}s on average. "
            f"Lower train.batch_size, or raise the number of {sample}s of rare sizes"
        )
