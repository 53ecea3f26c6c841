"""Where memory does not suffice: what is tried again, with how many rows, and when it is an error."""

import itertools
import logging

import pytest
import torch
from lines import line_policy

from posttrain.errors import PosttrainError, RewardError, TrainingError
from posttrain.policy import out_of_memory as memory
from posttrain.policy.out_of_memory import (
    OutOfMemory,
    halve_until_it_fits,
    is_out_of_memory,
    not_repeated,
    too_little,
)

LACK = torch.OutOfMemoryError("CUDA out of memory. " + "x" * 300)


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lack"),
    [
        (None, False),
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("MPS backend Out Of Memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (RewardError("HTTP 500: CUDA out of memory"), False),  # another machine's
        (caused(RewardError("x"), MemoryError()), True),
        (caused(ValueError("x"), caused(KeyError("y"), LACK)), True),
        (caused(RuntimeError("shapes"), LACK), False),  # a RuntimeError of torch's own says what it is
        (caused(ValueError("x"), ValueError("y")), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error, lack):
    assert is_out_of_memory(error) is lack


def test_messages_are_short_and_say_what_helps():
    error = too_little("with one row at a time", RuntimeError("two\n  words " + "x" * 300))
    assert str(error).startswith("out of memory with one row at a time (two words xxx")
    assert f"({'two words ' + 'x' * 190})" in str(error)
    assert "gradient_checkpointing" in str(error)
    assert type(error) is TrainingError
    stopped = OutOfMemory(RuntimeError("a\nb"), 8, 3)
    assert (str(stopped), stopped.micro_batch) == ("out of memory with 8 rows at a time (a b)", 3)


def test_what_must_not_be_repeated_is_an_error_that_says_where():
    with (
        pytest.raises(TrainingError, match="out of memory in the step") as found,
        not_repeated("in the step"),
    ):
        raise LACK
    assert found.value.__cause__ is LACK
    with pytest.raises(RuntimeError, match="shapes") as other, not_repeated("in the step"):
        raise RuntimeError("shapes")
    assert not isinstance(other.value, PosttrainError)


@pytest.fixture(autouse=True)
def given_back(monkeypatch):
    """What is done between two tries, in its order."""
    calls = []
    monkeypatch.setattr(memory.gc, "collect", lambda: calls.append("collect"))
    monkeypatch.setattr(memory, "free_memory", lambda device: calls.append(device))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: calls.append("autocast"))
    return calls


class Work:
    """Fails as long as more rows are asked for than there is ``room`` for; forwards ``rows`` at most at a time."""

    def __init__(self, policy, room, rows=64, error=LACK):
        self.policy, self.room, self.rows, self.error = policy, room, rows, error
        self.tried, self.undone = [], 0

    def __call__(self):
        rows = min(self.policy.micro_batch, self.rows)
        assert self.policy.largest_forward == 0
        self.policy.largest_forward = rows
        self.tried.append((self.policy.micro_batch, rows))
        if rows > self.room:
            raise self.error
        return "done"

    def undo(self, can=True):
        self.undone += 1
        return can


@pytest.mark.parametrize(
    ("micro_batch", "rows", "room", "tried"),
    [
        (8, 64, 8, [8]),
        (8, 64, 4, [8, 4]),
        (8, 64, 1, [8, 4, 2, 1]),
        (7, 64, 3, [7, 3]),
        (64, 12, 3, [64, 6, 3]),  # half of what was tried, not of what might have been
    ],
)
def test_rows_are_halved_until_they_fit(micro_batch, rows, room, tried, caplog):
    policy = line_policy(micro_batch=micro_batch)
    policy.largest_forward = 99
    work = Work(policy, room, rows)
    with caplog.at_level(logging.WARNING):
        assert halve_until_it_fits(work, policy, work.undo) == "done"
    assert [micro_batch for micro_batch, _ in work.tried] == tried
    assert policy.micro_batch == tried[-1]
    assert work.undone == len(tried) - 1
    said = [min(micro_batch, rows) for micro_batch in tried]
    assert [record.args for record in caplog.records] == list(itertools.pairwise(said))


def test_a_failure_before_the_first_forward_halves_the_chunk():
    policy, calls = line_policy(micro_batch=8), []

    def work():
        calls.append(policy.micro_batch)
        if policy.micro_batch > 4:
            raise MemoryError

    halve_until_it_fits(work, policy, lambda: True)
    assert calls == [8, 4]


def test_one_row_that_does_not_fit_is_an_error():
    work = Work(policy := line_policy(micro_batch=2), room=0)
    with pytest.raises(TrainingError, match="out of memory with one row at a time") as found:
        halve_until_it_fits(work, policy, work.undo)
    assert not isinstance(found.value, OutOfMemory)
    assert found.value.__cause__ is LACK
    assert (work.undone, policy.micro_batch) == (1, 1)


def test_work_that_cannot_be_undone_stops_with_what_to_go_on_with():
    work = Work(policy := line_policy(micro_batch=10), room=1, rows=6)
    with pytest.raises(OutOfMemory, match="with 6 rows at a time") as found:
        halve_until_it_fits(work, policy, lambda: work.undo(False))
    assert (found.value.micro_batch, policy.micro_batch, len(work.tried)) == (3, 10, 1)
    assert found.value.__cause__ is LACK


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes"), caused(TrainingError("x"), LACK), ValueError("out of memory")]
)
def test_other_errors_are_not_tried_again(error):
    work = Work(policy := line_policy(micro_batch=8), room=1, error=error)
    with pytest.raises(type(error)) as found:
        halve_until_it_fits(work, policy, work.undo)
    assert found.value is error
    assert (len(work.tried), work.undone, policy.micro_batch) == (1, 0, 8)


def test_what_is_kept_for_later_is_given_back_before_the_next_try(given_back):
    work = Work(policy := line_policy(micro_batch=4), room=2)
    halve_until_it_fits(work, policy, work.undo)
    assert given_back == ["collect", "autocast", torch.device("cpu")]
