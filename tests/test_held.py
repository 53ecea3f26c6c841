"""Bytes held at a time, and marks between blocks, worked out by hand: fours of bytes on the meta device."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from posttrain.planning.folding import folded
from posttrain.planning.held import Held, Segment

META = torch.device("meta")


def numbers(*shape):
    return torch.empty(*shape, device=META)


def test_a_segment_knows_what_it_changed_and_its_highest_points():
    segment = Segment(3)
    assert (segment.copies, segment.of_all, Segment(1, of_all=True).of_all) == (3, False, True)
    assert (segment.fixed, segment.each, segment.peak(5)) == (0, 0, 0)
    segment.add(-10, -1)
    assert (segment.fixed, segment.each, segment.peak(5)) == (-10, -1, 0), "it begins with what is there"
    segment.add(12, 0)
    segment.add(0, 2)
    assert (segment.fixed, segment.each, segment.peak(5)) == (2, 1, 7)
    segment.add(-1, -3)
    assert (segment.fixed, segment.each, segment.peak(5), segment.peak(0)) == (1, -2, 7, 2)
    assert segment.highs == [(0, 0), (2, -1), (2, 1)]
    segment.add(1, 0)
    assert segment.highs[-1] == (2, -2), "a single byte makes a high point"
    segment.add(0, 1)
    assert segment.highs[-1] == (2, -1)
    before = list(segment.highs)
    segment.add(0, -1)
    segment.add(-1, 0)
    assert segment.highs == before, "what is freed makes none"


def test_what_is_made_and_still_alive_is_counted_once():
    outside = numbers(100)
    with Held() as held:
        a = numbers(5)
        view, same, written = a[1:], a.view(5, 1), a.add_(1)
        into = torch.add(outside, 1, out=outside)
        plain = torch.ones(3).sum().item()
    assert held.peak() == 20 + 12 + 4, "of the three ones and their sum"
    assert plain == 3
    del view, same, written, into


def test_pairs_and_lists_of_tensors_are_counted_each():
    with Held() as held:
        kept = (
            torch.var_mean(numbers(6)),
            numbers(4).split(2),
            torch._foreach_add([numbers(1), numbers(2)], 1),
        )
    # 24 and 4 + 4, then 16 instead of the 24, then 12 twice
    assert held.peak() == 8 + 16 + 24
    del kept


def test_a_call_with_arguments_by_name_is_made_with_them():
    with Held() as held:
        kept = torch.zeros(3, dtype=torch.float64, device=META)
    assert (kept.dtype, held.peak()) == (torch.float64, 24)


def test_bytes_that_are_a_multiple_of_the_rows_are_of_rows():
    with Held(7) as held:
        kept = numbers(7), numbers(7, 3), numbers(5)
    assert [held.peak(rows) for rows in (0, 1, 2, 10)] == [20, 36, 52, 180]
    assert (held.peak(), type(held.peak())) == (36, int)
    del kept
    assert held.peak(2) == 52, "what was, was"
    with Held(1) as held:
        kept = numbers(2)
    assert [held.peak(rows) for rows in (1, 3)] == [8, 24], "of one row all bytes are its own"
    with Held() as held:
        kept = numbers(2)
    assert [held.peak(rows) for rows in (0, 1, 3)] == [8, 8, 8]
    del kept


def test_what_is_freed_makes_room():
    with Held() as held:
        a = numbers(10)
        b = numbers(5)
        del a
        c = numbers(7)
    assert held.peak() == 60
    del b, c


@pytest.mark.parametrize(("copies", "most"), [(1, 40 + 28), (2, 40 + 20 + 28), (4, 40 + 60 + 28)])
def test_a_segment_that_grows_is_highest_in_its_last_copy(copies, most):
    with Held() as held:
        kept = [numbers(10)]
        held.mark(copies)
        kept.append(numbers(5))
        numbers(2)
    assert held.peak() == most
    del kept


def test_a_segment_that_shrinks_is_highest_in_its_first_copy():
    with Held() as held:
        kept = [numbers(10) for _ in range(3)]
        held.mark(3)
        kept.append(numbers(2))
        del kept[0], kept[-1]
        assert held.peak() == 120 + 8
        held.mark(1)
        kept.append(numbers(1))
        assert held.peak() == 128, "and 0 + 4 after it"
        kept.append(numbers(40))
        assert held.peak() == 0 + 4 + 160
    del kept


def test_segments_follow_each_other():
    with Held(7) as held:
        kept = [numbers(7, 2)]
        held.mark(2)
        kept.append(numbers(7, 3))
        held.mark(3)
        kept.append(numbers(3))
        held.mark(1)
        kept.append(numbers(1))
    assert [held.peak(rows) for rows in (1, 10)] == [8 + 2 * 12 + 3 * 12 + 4, 80 + 240 + 36 + 4]
    del kept


@pytest.mark.parametrize(("of_all", "left"), [(True, 0), (False, 2)])
@pytest.mark.parametrize("rows", [1, 2, 10])
def test_what_is_freed_of_all_is_freed_for_each_copy_of_the_segment_that_made_it(of_all, left, rows):
    with Held(7) as held:
        kept = [numbers(10)]
        held.mark(3)
        kept += [numbers(5), numbers(7, 2)]
        held.mark(1, of_all=of_all)
        del kept[1:]
        held.mark(1)
        kept.append(numbers(100))
    assert held.peak(rows) == 40 + left * (20 + 8 * rows) + 400
    del kept


def test_a_freed_storage_may_lie_where_another_did():
    with Held() as held:
        for _ in range(50):
            numbers(3)
        kept = numbers(3)
    assert held.peak() == 12
    assert len(held._alive) == 1
    del kept
    assert held._alive == {}


class Double(nn.Module):
    """A block of two outputs and a word, or of one output."""

    def __init__(self, width, pair=True):
        super().__init__()
        self.weight, self.pair = nn.Parameter(torch.ones(width)), pair

    def forward(self, x, y):
        both = x * self.weight, y * self.weight
        return (*both, "word") if self.pair else both

    def __repr__(self):
        return "Double()"


class Stack(nn.Module):
    def __init__(self, *blocks, more=(), again=None):
        super().__init__()
        self.first, self.between = nn.ModuleList(blocks), nn.Identity()
        self.second, self.again, self.ran = nn.ModuleList(more), again, []

    def forward(self, x):
        x, y = x, x
        for block in [*self.first, *self.second]:
            self.ran.append(block)
            if self.again:
                with set_checkpoint_early_stop(self.again != "to the end"):
                    x, y = checkpoint(block, x, y, use_reentrant=False)[:2]
            else:
                x, y = block(x, y)[:2]
        return (x + y).sum()


def marks(stack, backward=True):
    """The marks of a forward and of its backward, which are kept apart by a None."""
    found = []
    with folded(stack, found.append):
        loss = stack(torch.ones(1, requires_grad=True) if backward else torch.ones(1))
        found.append(None)
        if backward:
            loss.backward()
    return found


# the mark after a block is of the one that follows; of more than three, the third and, backwards, the second
# stand for all that are left out
@pytest.mark.parametrize(
    ("layers", "ahead", "back"),
    [
        (1, [1], [1]),
        (2, [1, 1], [1, 1]),
        (3, [1, 1, 1], [1, 1, 1]),
        (4, [1, 2, 1], [1, 2, 1]),
        (6, [1, 4, 1], [1, 4, 1]),
    ],
)
@pytest.mark.parametrize("again", [None, "as far as needed", "to the end"])
def test_the_third_of_equal_blocks_stands_for_forwards_and_the_second_for_backwards(
    layers, ahead, back, again
):
    stack = Stack(*[Double(1) for _ in range(layers)], again=again)
    assert marks(stack) == [*ahead, None, *back]
    assert stack.ran == list(stack.first)[:3], "the first three stay"
    assert not any(block._forward_hooks for block in stack.first)


def test_lists_of_blocks_follow_each_other():
    stack = Stack(Double(1), *[Double(1, pair=False) for _ in range(2)], more=[Double(1) for _ in range(5)])
    # the second list's third stands for three, and so does its second on the way back
    assert marks(stack) == [1, 1, 1, 1, 3, 1, None, 1, 3, 1, 1, 1, 1]


def test_a_forward_alone_makes_its_marks():
    stack = Stack(*[Double(1) for _ in range(5)])
    for parameter in stack.parameters():
        parameter.requires_grad_(False)
    assert marks(stack, backward=False) == [1, 3, 1, None]


def changed(change):
    block = Double(1)
    change(block)
    return block


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "weight", nn.Parameter(torch.ones(2))),
        lambda block: block.double(),
        lambda block: block.requires_grad_(False),
        lambda block: block.register_parameter("other", nn.Parameter(torch.ones(1))),
        lambda block: setattr(
            block, "__class__", type("Other", (Double,), {"__repr__": lambda _: "Other()"})
        ),
    ],
    ids=["shape", "dtype", "trained", "names", "kind"],
)
def test_blocks_that_differ_are_not_folded(change):
    blocks = [Double(1), Double(1), changed(change), Double(1), Double(1)]
    stack = Stack(*blocks)
    with folded(stack, lambda copies: None):
        assert list(stack.first) == blocks
    stack = Stack(*[changed(change) for _ in range(5)])
    whole = stack.first
    with folded(stack, lambda copies: None):
        assert list(stack.first) == list(whole)[:3]
    assert stack.first is whole


def test_blocks_are_whole_again_after_an_error():
    stack = Stack(*[Double(1) for _ in range(5)])
    whole = stack.first
    with pytest.raises(RuntimeError), folded(stack, lambda copies: None):
        raise RuntimeError
    assert stack.first is whole
    assert not any(block._forward_hooks for block in whole)
