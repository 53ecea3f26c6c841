"""Tests that the order of the data is a function of its key, complete, and shared by all ranks."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.order import batches, batches_per_epoch, epoch_batches, rank_slice

KEY = (42, 1)
# Ids of the buckets are disjoint by construction: counts per bucket, numbered through.
counts = st.dictionaries(
    st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(0, 30), min_size=1, max_size=5
).filter(lambda sizes: sum(sizes.values()) > 0)


def buckets_of(sizes):
    buckets, first = {}, 0
    for bucket, count in sizes.items():
        buckets[bucket] = list(range(first, first + count))
        first += count
    return buckets


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_has_every_id_once_in_batches_of_one_bucket(sizes, batch_size, epoch):
    buckets = buckets_of(sizes)
    made = epoch_batches(buckets, batch_size, KEY, epoch)
    assert sorted(i for ids in made for i in ids) == list(range(sum(sizes.values())))
    assert len(made) == batches_per_epoch(buckets, batch_size)
    for ids in made:
        assert 1 <= len(ids) <= batch_size
        assert any(set(ids) <= set(members) for members in buckets.values())
    for members in buckets.values():  # at most one short batch a bucket
        short = [ids for ids in made if set(ids) <= set(members) and len(ids) < batch_size]
        assert len(short) == (len(members) % batch_size > 0)


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 9), st.integers(0, 200))
def test_starting_anywhere_goes_on_like_the_run_from_0(sizes, batch_size, start):
    buckets = buckets_of(sizes)
    whole = list(islice(batches(buckets, batch_size, KEY), start + 12))
    assert list(islice(batches(buckets, batch_size, KEY, start), 12)) == whole[start:]
    assert [step for _, step, _ in whole] == list(range(start + 12))
    length = batches_per_epoch(buckets, batch_size)
    for epoch, step, ids in whole:
        assert epoch == step // length
        assert ids == epoch_batches(buckets, batch_size, KEY, epoch)[step % length]


def test_order_does_not_depend_on_how_the_buckets_were_filled():
    one = {(1, 1): [0, 1, 2, 3], (2, 1): [4, 5, 6]}
    two = {(2, 1): [6, 4, 5], (1, 1): [3, 2, 1, 0]}
    assert epoch_batches(one, 2, KEY, 0) == epoch_batches(two, 2, KEY, 0)


def test_epochs_and_keys_differ_and_batches_of_buckets_are_mixed():
    buckets = {(1, 1): range(50), (2, 1): range(50, 100)}
    first = epoch_batches(buckets, 5, KEY, 0)
    assert first != epoch_batches(buckets, 5, KEY, 1)
    assert first != epoch_batches(buckets, 5, (43, 1), 0)
    assert {frozenset(ids) for ids in first} != {frozenset(ids) for ids in epoch_batches(buckets, 5, KEY, 1)}
    wide = [ids[0] >= 50 for ids in first]
    assert wide not in (sorted(wide), sorted(wide, reverse=True))


@settings(deadline=None)
@given(st.lists(st.integers(), unique=True, max_size=40), st.integers(1, 9))
def test_ranks_split_a_batch_without_overlap_and_evenly(ids, world_size):
    parts = [rank_slice(ids, rank, world_size) for rank in range(world_size)]
    assert sorted(i for part in parts for i in part) == sorted(ids)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("buckets", "size", "start"),
    [({}, 1, 0), ({(1, 1): []}, 1, 0), ({(1, 1): [0]}, 0, 0), ({(1, 1): [0]}, 1, -1)],
)
def test_an_order_without_end_or_meaning_is_refused_at_once(buckets, size, start):
    with pytest.raises(ValueError):
        batches(buckets, size, KEY, start)
