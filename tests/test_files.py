"""A file or folder of a run is there whole or not at all, whatever stops its writing."""

import errno
import multiprocessing
import os
import re
import shutil
import stat
import time
import types
from pathlib import Path

import pytest
import torch
from forked import finished, start
from full_disk import most_bytes
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from posttrain.errors import PosttrainError
from posttrain.support import files, write_errors
from posttrain.support.differences import differences
from posttrain.support.files import locked, published, write
from posttrain.support.paths import is_path
from posttrain.support.wording import nearest
from posttrain.weights.fitting import misfit

STOPS = [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt()]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stop", STOPS, ids=["disk", "exception", "interrupt"])
@pytest.mark.parametrize("step", ["write_bytes", "_flush", "replace"])
def test_a_write_that_is_stopped_leaves_the_old_file_whole_and_nothing_else(
    tmp_path, monkeypatch, stop, step
):
    write(tmp_path / "stage.json", "old")
    whole = Path.write_bytes

    def stopped(*arguments):
        if step == "write_bytes":
            whole(arguments[0], arguments[1][: len(arguments[1]) // 2])
        raise stop

    monkeypatch.setattr(files if step == "_flush" else Path, step, stopped)
    expected = PosttrainError if isinstance(stop, OSError) else type(stop)
    with pytest.raises(expected) as caught:
        write(tmp_path / "stage.json", "a new text")
    assert tree(tmp_path) == {"stage.json": "old"}
    if expected is PosttrainError:
        assert "stage.json': the disk is full (" in str(caught.value)
        assert "GB free, at least 10 B needed); what was written before is intact" in str(caught.value)


def write_folder(folder, stop):
    with published(folder, 2 * 10**9) as part:
        (part / "a").write_text("new")
        if stop is not None:
            raise stop


@pytest.mark.parametrize("stop", STOPS, ids=["disk", "exception", "interrupt"])
@pytest.mark.parametrize("step", ["in the block", "_flush", "rename", "second rename"])
def test_a_folder_that_is_stopped_leaves_the_old_one_whole_and_nothing_else(
    tmp_path, monkeypatch, stop, step
):
    with published(tmp_path / "final") as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("old")
    rename, calls = Path.rename, []

    def stopped(*arguments):
        calls.append(arguments)
        if step == "second rename" and len(calls) != 2:
            return rename(*arguments)
        raise stop

    if step == "_flush":
        monkeypatch.setattr(files, "_flush", stopped)
    elif step != "in the block":
        monkeypatch.setattr(Path, "rename", stopped)
    expected = PosttrainError if isinstance(stop, OSError) else type(stop)
    with pytest.raises(expected):
        write_folder(tmp_path / "final", stop if step == "in the block" else None)
    assert tree(tmp_path) == {"final/sub/a": "old"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path, monkeypatch, number):
    flush = os.fsync

    def of_files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    if number == errno.EIO:
        with pytest.raises(PosttrainError, match="cannot write"):
            write(tmp_path / "a", "text")
        return
    write(tmp_path / "a", "text")
    with published(tmp_path / "folder") as folder:
        (folder / "b").write_text("b")
    assert ((tmp_path / "a").read_text(), (tmp_path / "folder" / "b").read_text()) == ("text", "b")


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("a", "b"):
        with published(tmp_path / "final") as part:
            (part / name).write_text(name)
    assert tree(tmp_path) == {"final/b": "b"}


@pytest.mark.parametrize("moment", ["while it is written", "between the renames"])
def test_a_kill_leaves_the_old_folder_and_the_next_write_clears_up(tmp_path, moment):
    with published(tmp_path / "final") as part:
        (part / "a").write_text("old")

    def die():
        os.kill(os.getpid(), 9)

    def writing():
        rename, calls = Path.rename, []
        if moment == "between the renames":
            Path.rename = lambda *a: die() if calls else (calls.append(a), rename(*a))
        with published(tmp_path / "final") as part:
            (part / "b").write_text("half")
            if moment == "while it is written":
                die()

    assert finished(writing).returncode == -9
    assert "old" in tree(tmp_path).values()
    with pytest.raises(ZeroDivisionError), published(tmp_path / "final"):
        _ = 1 / 0
    assert tree(tmp_path) == {"final/a": "old"}


TENSORS = {"a": torch.zeros(100_000)}


@pytest.mark.parametrize(
    "save",
    [
        lambda part: torch.save(TENSORS, part / "state.pt"),
        lambda part: save_file(TENSORS, part / "model.safetensors"),
        lambda part: (part / "text").write_text("a" * 400_000),
    ],
    ids=["torch", "safetensors", "text"],
)
def test_what_any_library_says_of_a_write_that_failed_names_the_folder(tmp_path, save):
    with (
        pytest.raises(PosttrainError, match=r"cannot write .*step-1': .*at least 400 kB needed"),
        published(tmp_path / "step-1", 400_000) as part,
        most_bytes(100_000),
    ):
        save(part)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(("free", "words"), [(0, "the disk is full"), (10**12, r"cut off .*unexpected pos")])
def test_torch_does_not_say_why_a_write_was_cut_off_but_the_disk_does(tmp_path, monkeypatch, free, words):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    with (
        pytest.raises(PosttrainError, match=words),
        published(tmp_path / "a", 400_000) as part,
        most_bytes(9999),
    ):
        torch.save(TENSORS, part / "state.pt")


def test_safetensors_words_for_a_full_disk_are_known():
    words = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert write_errors.problem(RuntimeError(words)) == "the disk is full"
    assert write_errors.problem(RuntimeError("CUDA error: device-side assert triggered")) is None


def test_a_lock_is_held_against_others_and_goes_with_its_process(tmp_path):
    said, says = multiprocessing.get_context("fork").Pipe(duplex=False)

    def holding():
        with locked(tmp_path / ".lock"):
            says.send("held")
            time.sleep(60)

    child = start(holding)
    try:
        assert said.poll(30)
        with locked(tmp_path / ".lock", wait=False) as held:
            assert not held
    finally:
        child.kill()
        child.join()
    with locked(tmp_path / ".lock", wait=False) as held:
        assert held
    with locked(tmp_path / ".lock") as held:
        assert held


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_the_nearest_multiples_are_multiples_around_the_value(value, unit):
    words = nearest(value, unit)
    near = [int(word) for word in re.findall(r"\d+", words)]
    assert all(n > 0 and n % unit == 0 and abs(n - value) <= unit for n in near)
    assert len(near) == (2 if value >= unit else 1)
    assert words.startswith("the nearest are " if len(near) == 2 else "the nearest is ")


@pytest.mark.parametrize(
    ("text", "stage", "hub"),
    [
        ("soar", False, False),
        *((path, True, True) for path in ("./soar", "..", "~/a", "/a")),
        *((name, True, False) for name in ("runs/a/final", "openai/clip")),
    ],
)
def test_a_path_is_told_from_the_name_of_a_stage_and_of_a_hub(text, stage, hub):
    assert is_path(text) == stage
    assert is_path(text, hub=True) == hub


def test_differences_are_named_by_their_place_and_free_ones_are_not():
    before = {"a": [{"b": 1}, {"b": 2}], "free": {"x": 1}, "c": [1]}
    now = {"a": [{"b": 1}, {"b": 3}], "free": {"x": 2}, "c": [1, 2], "d": 0}
    expected = ["a.1.b (was 2, now 3)", "c (was [1], now [1, 2])", "d (was None, now 0)"]
    assert list(differences(before, now, ("free",))) == expected
    assert list(differences(before, before)) == []


def test_weights_fit_in_all_names_and_shapes_or_are_told():
    own = {name: torch.zeros(2) for name in "abc"}
    assert misfit(own, dict(own)) is None
    state = {"b": torch.zeros(3), "c": own["c"], "x": own["a"], "y": own["a"]}
    assert misfit(own, state) == "1 missing (a); 2 left over (x, y); 1 of another shape (b: (3,), not (2,))"
    assert misfit(own, {**own, "b": torch.zeros(3)}) == "1 of another shape (b: (3,), not (2,))"
