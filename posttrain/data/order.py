"""The order in which samples are seen: a function of key, epoch and step, without state.

Every rank computes the same batches and takes its own slice, so ranks never overlap. A resumed run can start
at any step, at the cost of one epoch's permutation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from posttrain.data.table import Bucket
from posttrain.support.randomness import generator

Buckets = Mapping[Bucket, Sequence[int]]
"""Bucket -> the ids of its samples. Each id is in one bucket."""


def epoch_batches(buckets: Buckets, batch_size: int, key: tuple[object, ...], epoch: int) -> list[list[int]]:
    """The batches of ``epoch`` (from 0), in order. Each id occurs once; each batch has ids of one bucket.

    ``batch_size`` counts the samples of all ranks together. The last batch of a bucket may be shorter.
    """
    draw = generator(*key, "order", epoch)
    batches = []
    for bucket in sorted(buckets):
        ids = sorted(buckets[bucket])
        ids = [ids[i] for i in torch.randperm(len(ids), generator=draw).tolist()]
        batches += [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def batches_per_epoch(buckets: Buckets, batch_size: int) -> int:
    """The number of batches of :func:`epoch_batches`, which is the same for every epoch."""
    return sum(-(-len(ids) // batch_size) for ids in buckets.values())


def batches(
    buckets: Buckets, batch_size: int, key: tuple[object, ...], start_step: int = 0
) -> Iterator[tuple[int, int, list[int]]]:
    """Yield (epoch, step, ids) for ``start_step`` (from 0) and every later step, without end.

    Raises ValueError if there is no id, ``batch_size`` is below 1, or ``start_step`` is below 0.
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


def rank_slice(ids: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The contiguous part of a batch that ``rank`` takes.

    If the batch does not divide evenly, the first ranks have one sample more; the last ranks may have none.
    """
    each, remainder = divmod(len(ids), world_size)
    start = rank * each + min(rank, remainder)
    return list(ids[start : start + each + (rank < remainder)])
