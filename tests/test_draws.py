"""Draws and the order of data: recorded numbers, and that every part of a key counts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.order import batches, batches_per_epoch, epoch_batches, rank_slice
from posttrain.support.randomness import Draws, generator

DRAWS = Draws((42, 1, 7), [3, 5])
BUCKETS = {(2, 1): [5, 4, 3, 6, 7], (1, 1): [2, 0, 1]}


def first(*key):
    return torch.rand((), generator=generator(*key)).item()


def test_recorded_draws_never_change():
    """A run that goes on, or is done again by a later version, must draw what it drew."""
    stream = torch.rand(3, generator=generator(1, "a", 2)).tolist()
    assert stream == pytest.approx([0.6138880848884583, 0.5467538833618164, 0.021647870540618896])
    noise = DRAWS.normal("noise", (2,))
    torch.testing.assert_close(
        noise,
        torch.tensor(
            [[-0.18767790496349335, -0.19177359342575073], [-0.8988107442855835, -0.6822044849395752]]
        ),
    )
    assert DRAWS.uniform("t").tolist() == pytest.approx([0.3554377555847168, 0.2688828706741333])
    assert DRAWS.integer("w", 0, 9) == 4
    assert DRAWS.permutations("p", 6).tolist() == [[3, 4, 0, 5, 2, 1], [4, 2, 1, 0, 5, 3]]


def test_a_recorded_order_never_changes():
    assert epoch_batches(BUCKETS, 2, (42, 1), 0) == [[1], [4, 3], [5], [7, 6], [0, 2]]
    assert epoch_batches(BUCKETS, 2, (42, 1), 1) == [[5, 4], [1, 2], [6], [0], [7, 3]]


def test_every_part_of_a_key_counts():
    keys = [
        (1, "a", 2),
        (2, "a", 2),
        (1, "b", 2),
        (1, "a", 3),
        (1, "a"),
        (1, "a", 2, 0),
        (2, "a", 1),
        (1, "a2"),
    ]
    keys += [("ab", "c"), ("a", "bc"), ("1", "a", 2)]
    found = [first(*key) for key in keys]
    assert len(set(found)) == len(keys)
    assert found == [first(*key) for key in keys]


KINDS = {
    "normal": lambda draws, purpose: draws.normal(purpose, (2,)),
    "uniform": lambda draws, purpose: draws.uniform(purpose, (2,)),
    "permutations": lambda draws, purpose: draws.permutations(purpose, 12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_draws_by_seed_depth_step_purpose_and_id_alone(kind):
    draw = KINDS[kind]
    rows = {
        (key, purpose, i): tuple(draw(Draws(key, [9, i]), purpose)[1].tolist())
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        for purpose in ("noise", "other")
        for i in (4, "4", 5)
    }
    assert len(set(rows.values())) == len(rows)
    assert rows[(0, 0, 0), "noise", 4] == tuple(draw(Draws((0, 0, 0), [4]), "noise")[0].tolist())


def test_an_integer_is_one_for_the_batch_and_takes_both_ends():
    found = {(key, p): Draws(key, [1]).integer(p, 0, 10**9) for key in [(0, 0), (1, 0), (0, 1)] for p in "ab"}
    assert len(set(found.values())) == len(found)
    assert found[(0, 0), "a"] == Draws((0, 0), [2, 3]).integer("a", 0, 10**9)
    assert {DRAWS.integer(str(i), 2, 4) for i in range(40)} == {2, 3, 4}
    assert DRAWS.integer("one", 6, 6) == 6
    assert type(DRAWS.integer("one", 6, 6)) is int


def test_shapes_types_and_ranges():
    assert DRAWS.normal("x", (3, 4)).shape == (2, 3, 4)
    assert DRAWS.uniform("x", (3, 4)).shape == (2, 3, 4)
    assert DRAWS.uniform("x").shape == (2,)
    values = DRAWS.uniform("x", (1000,))
    assert values.dtype == DRAWS.normal("x", (1,)).dtype == torch.float32
    assert 0 <= values.min() < 0.01 < 0.99 < values.max() < 1
    normal = DRAWS.normal("x", (4000,))
    assert normal.mean().abs() < 0.05
    assert abs(normal.std() - 1) < 0.05
    assert all(sorted(row) == list(range(5)) for row in DRAWS.permutations("x", 5).tolist())


def test_draws_of_others_keep_the_key_and_the_device():
    draws = Draws((1, 2), [7, 8, 9], "meta")
    assert Draws((1, 2), [7]).device == "cpu"
    assert draws.take(slice(1, 3)) == Draws((1, 2), [8, 9], "meta")
    assert draws.of([4, 4]) == Draws((1, 2), [4, 4], "meta")
    for made in (draws.normal("x", (2,)), draws.uniform("x"), draws.permutations("x", 3)):
        assert made.device.type == "meta"
    alike = Draws((1, 2), [7, 8]).of([4, 4]).uniform("x")
    assert alike[0] == alike[1]


def test_every_part_of_an_orders_key_counts_and_buckets_draw_one_after_the_other():
    ids = {(1, 1): range(30)}
    orders = [
        tuple(map(tuple, epoch_batches(ids, 3, key, e)))
        for key, e in itertools.product([(0,), (1,), (0, 0)], [0, 1])
    ]
    assert len(set(orders)) == len(orders)
    made = sorted(epoch_batches({(1, 1): range(9), (2, 1): range(9, 18)}, 9, (0,), 0))
    assert made[0] != [i - 9 for i in made[1]]
    assert made[0] != list(range(9)), "ids are shuffled within their bucket"


def test_an_order_from_the_middle_of_an_epoch():
    # 5 batches an epoch: steps 6 and 7 are the second and third of epoch 1
    assert batches_per_epoch(BUCKETS, 2) == 5
    found = list(itertools.islice(batches(BUCKETS, 2, (42, 1), 6), 5))
    epochs = [epoch_batches(BUCKETS, 2, (42, 1), e) for e in range(3)]
    assert found == [
        (1, 6, epochs[1][1]),
        (1, 7, epochs[1][2]),
        (1, 8, epochs[1][3]),
        (1, 9, epochs[1][4]),
        (2, 10, epochs[2][0]),
    ]
    assert next(batches(BUCKETS, 2, (42, 1))) == (0, 0, epochs[0][0])


@pytest.mark.parametrize(("size", "count"), [(1, 8), (2, 5), (3, 3), (4, 3), (5, 2), (100, 2)])
def test_batches_of_an_epoch_are_counted(size, count):
    assert batches_per_epoch(BUCKETS, size) == len(epoch_batches(BUCKETS, size, (0,), 0)) == count


@pytest.mark.parametrize(
    ("buckets", "size", "start", "words"),
    [
        ({}, 1, 0, "no samples"),
        ({(1, 1): []}, 1, 0, "no samples"),
        (BUCKETS, 0, 0, r"batch_size must be 1 or more and start_step 0 or more: 0, 0"),
        (BUCKETS, 1, -1, r"start_step 0 or more: 1, -1"),
    ],
)
def test_an_order_that_cannot_be_says_why(buckets, size, start, words):
    with pytest.raises(ValueError, match=words):
        batches(buckets, size, (0,), start)


def test_ranks_take_neighbours_and_the_first_take_one_more():
    assert [rank_slice("abcdefg", rank, 3) for rank in range(3)] == [list("abc"), list("de"), list("fg")]
    assert [rank_slice("abcdefgh", rank, 3) for rank in range(3)] == [list("abc"), list("def"), list("gh")]
    assert [rank_slice("a", rank, 3) for rank in range(3)] == [["a"], [], []]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 30), st.integers(1, 6))
def test_the_ranks_parts_in_their_order_are_the_batch(count, world):
    parts = [rank_slice(range(count), rank, world) for rank in range(world)]
    assert list(itertools.chain(*parts)) == list(range(count))
    assert [len(part) for part in parts] == sorted((len(part) for part in parts), reverse=True)
