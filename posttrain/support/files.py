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
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from posttrain.support.write_errors import writing

FICLONE = 0x40049409
"""Linux's request to let a file share the blocks of another one (btrfs, xfs, bcachefs)."""

PART, BEFORE = ".part", ".before.part"
"""How the names of what is unfinished end, and of an old folder while a new one takes its name."""

STALE_SECONDS = 3600
"""What is being written changes more often than this."""


def write(file: Path, content: str | bytes) -> None:
    """Write ``file`` atomically, text as UTF-8. If several processes write it at once, the last one wins.

    A pipe or a device, such as ``/dev/stdout``, is written directly, and through a link the file that it
    names. Raises PosttrainError if it cannot be written; an existing file is then unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(file, len(data)):
        if file.exists() and not file.is_file() and not file.is_dir():
            file.write_bytes(data)
            return
        target = file.resolve()
        with aside(target, secrets.token_hex(4)) as unfinished:
            unfinished.write_bytes(data)
            publish(unfinished, target)


def check_writable(file: Path) -> None:
    """Raise PosttrainError if ``file`` cannot be written, before long work whose result it is to hold."""
    with writing(file):
        if file.is_dir():
            raise IsADirectoryError(str(file))
        if file.is_file() or not file.exists():
            with aside(file.resolve(), secrets.token_hex(4)) as unfinished:
                unfinished.write_bytes(b"")


@contextlib.contextmanager
def published(folder: Path, needs: int | None = None, mark: str = "") -> Iterator[Path]:
    """Yield a new folder that becomes ``folder`` at the end of the block. One process at a time may write it.

    With a ``mark`` others may write files of theirs to it: it is :func:`beside` (folder, mark), and who comes
    first makes it. ``needs`` is the least number of bytes that it takes, for the error message. Raises
    PosttrainError if it cannot be written; an existing folder is then unchanged.
    """
    with writing(folder, needs), aside(folder, mark) as unfinished:
        unfinished.mkdir(exist_ok=bool(mark))
        yield unfinished
        _readable(unfinished)
        publish(unfinished, folder)


@contextlib.contextmanager
def aside(target: Path, mark: str = "") -> Iterator[Path]:
    """Yield a path beside ``target``, whose content :func:`publish` renames to ``target``; the rest is
    removed.

    Processes that write the same target at once need a ``mark`` each. Without one the path is the same each
    time, and the remains of a killed process are removed first.
    """
    unfinished = beside(target, mark)
    if not mark:
        _remove(unfinished)
    target.parent.mkdir(parents=True, exist_ok=True)
    if (before := _before(target)).exists() and not target.exists():
        before.rename(target)  # a kill came between publish's two renames
    try:
        yield unfinished
    finally:
        _remove(unfinished)


def beside(target: Path, mark: str) -> Path:
    """Where what becomes ``target`` is written. The ``mark`` is part of its name."""
    return target.with_name(f".{target.name}{mark and f'.{mark}'}{PART}")


def copy(file: Path, target: Path) -> int:
    """Copy ``file`` to ``target``, a new file that shares nothing with it; returns the bytes that it takes.

    Where the file system can, both keep the same blocks until one is written: 0 bytes. Raises OSError.
    """
    with contextlib.suppress(ImportError, OSError):  # not Linux, or another file system
        import fcntl

        with file.open("rb") as source, target.open("wb") as clone:
            fcntl.ioctl(clone, FICLONE, source.fileno())
        return 0
    shutil.copyfile(file, target)
    return target.stat().st_size


def publish(unfinished: Path, target: Path) -> None:
    """Flush ``unfinished``, a file or folder, to the disk and rename it to ``target``, which it replaces.

    Raises OSError.
    """
    for file in unfinished.rglob("*") if unfinished.is_dir() else [unfinished]:
        _flush(file)
    if unfinished.is_dir() and target.is_dir():
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


def remove(folder: Path) -> None:
    """Remove ``folder``, all of it at once. Raises PosttrainError if that is not possible."""
    gone = folder.with_name(f".{folder.name}.part")
    _remove(gone)
    with writing(folder):
        folder.rename(gone)  # a kill while files are removed leaves no half of a folder under its name
    _remove(gone)


def clear_up(folder: Path) -> None:
    """Remove what killed processes left unfinished in ``folder``. No other process may be writing there."""
    for part in [*folder.glob(f".*{PART}")]:
        clear(part)


@contextlib.contextmanager
def locked(file: Path, *, wait: bool | float = True) -> Iterator[bool]:
    """Hold the lock ``file`` against all other processes. The file is created if it is missing, and stays.

    Yields True if the lock is held, and False if another process holds it and ``wait`` is False or seconds
    that passed. The lock ends with the process, however the process ends. Raises OSError if the file cannot
    be opened.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait is True else float(wait))
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_unfinished(name: str) -> bool:
    """Whether :func:`aside` or :func:`publish` gave the name, and the process is at work or was killed."""
    return name.startswith(".") and name.endswith(PART)


def clear(path: Path) -> None:
    """Remove ``path``, which is unfinished; an old folder whose successor never came gets its name back."""
    target = path.with_name(path.name[1:].removesuffix(BEFORE))
    if path.name.endswith(BEFORE) and not target.exists():
        path.rename(target)
    else:
        _remove(path)


def clear_stale(folder: Path, pattern: str = f".*{PART}") -> None:
    """Remove what matches ``pattern`` in ``folder`` and was last written so long ago that no process can be
    at work on it."""
    for part in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process was faster
            newest = max(path.stat().st_mtime for path in (part, *part.glob("*")))
            if time.time() - newest > STALE_SECONDS:
                _remove(part)


def _readable(folder: Path) -> None:
    """Let others read the files in the new ``folder`` as the umask says, by which the folder was made.

    Libraries that write to a temporary file and rename it leave it to its owner alone.
    """
    allowed = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and (mode := file.stat().st_mode) & 0o666 != mode & 0o666 | allowed:
            file.chmod(mode | allowed)


def _before(folder: Path) -> Path:
    """The path of an old folder while a new one takes its name."""
    return folder.with_name(f".{folder.name}{BEFORE}")


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems, such as shared folders of virtual machines, cannot flush a folder
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or folder, if it exists and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
