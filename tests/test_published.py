"""A folder appears whole under its name, or not at all, whatever fails."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain import checkpoint
from posttrain.errors import PosttrainError


def test_a_folder_is_published_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "final"
    with checkpoint.published(target) as part:
        assert part == tmp_path / "deep" / ".final.part"
        (part / "a").mkdir()
        (part / "a" / "b").write_text("one")
        assert not target.exists()
    assert (target / "a" / "b").read_text() == "one"
    part.mkdir()
    (part / "left").touch()  # by one that was killed
    with checkpoint.published(target) as part:
        (part / "c").write_text("two")
    assert [p.name for p in target.iterdir()] == ["c"]
    assert [p.name for p in target.parent.iterdir()] == ["final"]


def failing(target, error, removed):
    """Fail while the folder is written, which somebody may have ``removed``."""
    with checkpoint.published(target) as part:
        if removed:
            shutil.rmtree(target.parent if target.parent.name == "none" else part)
        raise error


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (OSError(errno.EDQUOT, "x"), "the disk is full"),
        (RuntimeError("No space left on device"), "the disk is full"),
        (OSError(errno.EACCES, "denied"), r"\[Errno 13\] denied"),
        (RuntimeError("PytorchStreamWriter failed WRITING"), "PytorchStreamWriter failed WRITING"),
    ],
)
def test_a_disk_that_fails_is_one_clear_error_and_leaves_what_was_there(tmp_path, monkeypatch, fault, words):
    asked, room = [], SimpleNamespace(free=2_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or room)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    for target in (tmp_path / "old", tmp_path / "none" / "final"):
        match = rf"cannot write '{target}': {words} \(2\.50 GB free\); earlier"
        with pytest.raises(PosttrainError, match=match) as found:
            failing(target, fault, removed=target.parent != tmp_path)
        assert found.value.__cause__ is fault
        assert not target.with_name(f".{target.name}.part").exists()
    assert (tmp_path / "old" / "file").exists()
    assert asked == [tmp_path, Path.cwd()]


@pytest.mark.parametrize("error", [PosttrainError("mine"), RuntimeError("mine")])
def test_other_errors_are_passed_on_and_leave_nothing(tmp_path, error):
    for removed in (False, True):
        with pytest.raises(type(error), match=r"^mine$"):
            failing(tmp_path / "final", error, removed)
        assert list(tmp_path.iterdir()) == []


def test_files_and_their_folder_reach_the_disk_before_and_after_the_name(tmp_path, monkeypatch):
    synced, opened, opening, closing, syncing = [], [], os.open, os.close, os.fsync

    def inode(descriptor):
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "final").exists()))
        syncing(descriptor)

    def noting(path, flags, *rest, **named):
        opened.append(descriptor := opening(path, flags, *rest, **named))
        return descriptor

    with checkpoint.published(tmp_path / "final") as part:
        (part / "a").mkdir()
        (part / "a" / "b").touch()
        monkeypatch.setattr(os, "fsync", inode)
        monkeypatch.setattr(checkpoint.os, "open", noting)
        monkeypatch.setattr(os, "close", lambda d: (d in opened and opened.remove(d)) or closing(d))
    file = tmp_path / "final" / "a" / "b"
    assert synced == [(file.stat().st_ino, False), (tmp_path.stat().st_ino, True)]
    assert opened == []
