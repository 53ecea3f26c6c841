"""Writes files and folders so that they are there whole or not at all, and locks them between processes.

What is written goes to a path beside its target, is flushed to the disk, and gets its name last. So a kill, a
full disk or an exception at any moment leaves the target as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from posttrain.errors import PosttrainError
from posttrain.support.wording import short

FULL = ("No space left", "Disk quota exceeded", "(os error 28)", "(os error 122)")
"""What libraries that raise no OSError say of a full disk; safetensors names the system's error so."""
CUT_OFF = ("unexpected pos", "iostream error", "file write failed", "PytorchStreamWriter failed")
"""What torch says where it could not write all of a file; it does not say why."""


def write(file: Path, content: str | bytes) -> None:
    """Write ``file`` atomically; text is UTF-8. Of processes that write it at once, the last one wins.

    Raises PosttrainError where it cannot be written; what was there before is then whole.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(file, len(data)), aside(file, shared=True) as part:
        part.write_bytes(data)
        publish(part, file)


@contextlib.contextmanager
def published(folder: Path, needs: int | None = None) -> Iterator[Path]:
    """A new folder that becomes ``folder`` at the end of the block. One process at a time may write it.

    ``needs`` is how many bytes it takes at least, for the message. Raises PosttrainError where it cannot be
    written; what was there before is then whole.
    """
    with writing(folder, needs), aside(folder) as part:
        part.mkdir()
        yield part
        publish(part, folder)


@contextlib.contextmanager
def aside(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path beside ``target`` for what :func:`publish` is to rename to it; what is left there is removed.

    Where the target is ``shared``, each call gets a path of its own. Else it is the same each time, and what
    a killed process left there is removed first.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    part = target.with_name(f".{target.name}{own}.part")
    _remove(part)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (before := _before(target)).exists() and not target.exists():
        before.rename(target)  # a kill came between the two renames that replace a folder
    try:
        yield part
    finally:
        _remove(part)


def publish(part: Path, target: Path, *, replace: bool = True) -> None:
    """Flush ``part`` to the disk and rename it to ``target``, a file or folder, which it replaces.

    Raises OSError, also for a folder at ``target`` that is not empty where it is not to be replaced.
    """
    for file in part.rglob("*") if part.is_dir() else [part]:
        _flush(file)
    if replace and part.is_dir() and target.is_dir():
        # Python has no call that swaps two folders
        before = _before(target)
        _remove(before)
        target.rename(before)
        try:
            part.rename(target)
        except BaseException:
            if not target.exists():
                before.rename(target)
            raise
        _remove(before)
    elif part.is_dir():
        part.rename(target)
    else:
        part.replace(target)
    _flush(target.parent)


@contextlib.contextmanager
def writing(path: Path, needs: int | None = None) -> Iterator[None]:
    """Turn what goes wrong while ``path`` is written into a PosttrainError that names it.

    ``needs`` is how many bytes are to be written, at least. Other exceptions pass.
    """
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:
        there = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(there).free
        if (why := problem(error, room=needs is None or needs < free)) is None:
            raise
        wanted = "" if needs is None else f", at least {short(needs, 'B')} needed"
        raise PosttrainError(
            f"cannot write {str(path)!r}: {why} ({free / 1e9:.2f} GB free{wanted}); "
            "what was written before is intact"
        ) from error


def problem(error: Exception, *, room: bool = True) -> str | None:
    """Why a file could not be written, if that is what ``error`` of any library says; else None.

    ``room`` says whether the disk has room for it, where the library does not say what went wrong.
    """
    words = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(says in words for says in FULL):
        return "the disk is full"
    if any(says in words for says in CUT_OFF):
        return f"it was cut off ({words.strip().splitlines()[0]})" if room else "the disk is full"
    if isinstance(error, OSError):
        return words
    return f"safetensors: {words}" if type(error).__name__ == "SafetensorError" else None


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock ``file`` against all other processes; the file is made if need be, and stays.

    Yields whether the lock is held: False only where another process has it and this one does not ``wait``.
    The lock goes with the process, however that ends. Raises OSError where the file cannot be opened.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _before(folder: Path) -> Path:
    """Where a folder lies while another one takes its name."""
    return folder.with_name(f".{folder.name}.before.part")


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
