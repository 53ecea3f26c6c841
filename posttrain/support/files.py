"""Writes files and folders atomically, and locks them between processes.

Content goes to a path beside its target, is flushed to the disk, and is renamed to the target last. So a
kill, a full disk or an exception at any moment leaves the target unchanged.
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
"""Messages about a full disk from libraries that raise no OSError, such as safetensors."""
CUT_OFF = ("unexpected pos", "iostream error", "file write failed", "PytorchStreamWriter failed")
"""Messages of torch about a file that it could not write completely. They do not tell why."""


def write(file: Path, content: str | bytes) -> None:
    """Write ``file`` atomically, text as UTF-8. If several processes write it at once, the last one wins.

    Raises PosttrainError if it cannot be written; an existing file is then unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(file, len(data)), aside(file, shared=True) as unfinished:
        unfinished.write_bytes(data)
        publish(unfinished, file)


@contextlib.contextmanager
def published(folder: Path, needs: int | None = None) -> Iterator[Path]:
    """Yield a new folder that becomes ``folder`` at the end of the block. One process at a time may write it.

    ``needs`` is the least number of bytes that it takes, for the error message. Raises PosttrainError if it
    cannot be written; an existing folder is then unchanged.
    """
    with writing(folder, needs), aside(folder) as unfinished:
        unfinished.mkdir()
        yield unfinished
        publish(unfinished, folder)


@contextlib.contextmanager
def aside(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path beside ``target``, whose content :func:`publish` renames to ``target``; the rest is
    removed.

    If the target is ``shared`` between processes, each call gets its own path. Else the path is the same each
    time, and the remains of a killed process are removed first.
    """
    own = f".{secrets.token_hex(4)}" if shared else ""
    unfinished = target.with_name(f".{target.name}{own}.part")
    _remove(unfinished)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (before := _before(target)).exists() and not target.exists():
        before.rename(target)  # a kill came between publish's two renames
    try:
        yield unfinished
    finally:
        _remove(unfinished)


def publish(unfinished: Path, target: Path, *, replace: bool = True) -> None:
    """Flush ``unfinished``, a file or folder, to the disk and rename it to ``target``, which it replaces.

    Raises OSError, also if ``replace`` is False and ``target`` is a folder that is not empty.
    """
    for file in unfinished.rglob("*") if unfinished.is_dir() else [unfinished]:
        _flush(file)
    if replace and unfinished.is_dir() and target.is_dir():
        # Python has no call that swaps two folders
        before = _before(target)
        _remove(before)
        target.rename(before)
        try:
            unfinished.rename(target)
        except BaseException:
            if not target.exists():
                before.rename(target)
            raise
        _remove(before)
    elif unfinished.is_dir():
        unfinished.rename(target)
    else:
        unfinished.replace(target)
    _flush(target.parent)


@contextlib.contextmanager
def writing(path: Path, needs: int | None = None) -> Iterator[None]:
    """Turn write errors inside the block into a PosttrainError that names ``path``. Other exceptions pass.

    ``needs`` is the least number of bytes to be written, for the message.
    """
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:
        existing = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(existing).free
        if (why := problem(error, room=needs is None or needs < free)) is None:
            raise
        wanted = "" if needs is None else f", at least {short(needs, 'B')} needed"
        raise PosttrainError(
            f"cannot write {str(path)!r}: {why} ({free / 1e9:.2f} GB free{wanted}); "
            "what was written before is intact"
        ) from error


def problem(error: Exception, *, room: bool = True) -> str | None:
    """The reason why a file could not be written; None if ``error`` is not a write error of a known library.

    ``room`` tells whether the disk has room for the file, for libraries whose error does not give a reason.
    """
    message = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in message for text in FULL):
        return "the disk is full"
    if any(text in message for text in CUT_OFF):
        return f"it was cut off ({message.strip().splitlines()[0]})" if room else "the disk is full"
    if isinstance(error, OSError):
        return message
    return f"safetensors: {message}" if type(error).__name__ == "SafetensorError" else None


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock ``file`` against all other processes. The file is created if it is missing, and stays.

    Yields True if the lock is held, and False if another process holds it and ``wait`` is False. The lock
    ends with the process, however the process ends. Raises OSError if the file cannot be opened.
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
    """The path of an old folder while a new one takes its name."""
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
    """Remove a file or folder, if it exists and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
