"""In which order are the samples seen? A function of key, epoch and step; there is no state.

Every rank computes the same batches and takes its own slice, so ranks never overlap, and a resumed run
starts anywhere at the price of one epoch's permutation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from posttrain.data.rows import Bucket
from posttrain.support.randomness import generator

Buckets = Mapping[Bucket, Sequence[int]]
"""Bucket -> the ids of its samples; each id is in one bucket."""


def epoch_batches(buckets: Buckets, batch_size: int, key: tuple[object, ...], epoch: int) -> list[list[int]]:
    """Every id exactly once, in batches of one bucket each, in the order of ``epoch`` (from 0).

    The last batch of a bucket may be short. ``batch_size`` counts the samples of all ranks together.
    """
    draw = generator(*key, "order", epoch)
    batches = []
    for bucket in sorted(buckets):
        ids = sorted(buckets[bucket])
        ids = [ids[i] for i in torch.randperm(len(ids), generator=draw).tolist()]
        batches += [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def batches_per_epoch(buckets: Buckets, batch_size: int) -> int:
    """How many batches :func:`epoch_batches` makes; the same for every epoch."""
    return sum(-(-len(ids) // batch_size) for ids in buckets.values())


def batches(
    buckets: Buckets, batch_size: int, key: tuple[object, ...], start_step: int = 0
) -> Iterator[tuple[int, int, list[int]]]:
    """(epoch, step, ids) of step ``start_step`` (from 0) and all later ones, without end.

    Raises ValueError if there is no id, or if ``batch_size`` or ``start_step`` is out of range.
    """
    if batch_size < 1 or start_step < 0:
        raise ValueError(f"batch_size must be 1 or more and start_step 0 or more: {batch_size}, {start_step}")
    if not (length := batches_per_epoch(buckets, batch_size)):
        raise ValueError("no samples to order")
    return _endless(buckets, batch_size, key, start_step, length)


def _endless(
    buckets: Buckets, batch_size: int, key: tuple[object, ...], step: int, length: int
) -> Iterator[tuple[int, int, list[int]]]:
    while True:
        epoch, first = divmod(step, length)
        for ids in epoch_batches(buckets, batch_size, key, epoch)[first:]:
            yield epoch, step, ids
            step += 1


def rank_slice(ids: Sequence[int], rank: int, world: int) -> list[int]:
    """The part of a batch that ``rank`` of ``world`` takes: neighbours, so that groups stay together as far
    as they can. The first ranks have one more where it does not come out even, and the last may have none."""
    each, more = divmod(len(ids), world)
    start = rank * each + min(rank, more)
    return list(ids[start : start + each + (rank < more)])
