"""Says in words why a file or folder could not be written."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import PosttrainError
from posttrain.support.paths import in_the_way
from posttrain.support.wording import short

FULL = ("No space left", "Disk quota exceeded", "(os error 28)", "(os error 122)")
"""Messages about a full disk from libraries that raise no OSError, such as safetensors."""
CUT_OFF = ("unexpected pos", "iostream error", "file write failed", "PytorchStreamWriter failed")
"""Messages of torch about a file that it could not write completely. They do not tell why."""
WRONG_KIND = (FileExistsError, IsADirectoryError, NotADirectoryError)
"""A file is where a folder is to be, or the other way round."""


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
        if isinstance(error, WRONG_KIND) and (why := _wrong_kind(path)) is not None:
            raise PosttrainError(f"cannot write {str(path)!r}: {why}") from error
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


def _wrong_kind(path: Path) -> str | None:
    """Why ``path`` cannot be written, in words, after one of the errors WRONG_KIND."""
    if path.is_dir():
        return "it is a folder, a file is expected"
    return in_the_way(path)
