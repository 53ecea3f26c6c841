"""Where the bytes of an image are: a file of its own, or a part of a larger file."""

from __future__ import annotations

import hashlib
import io
import stat
from dataclasses import dataclass
from pathlib import Path

MAX_PART = 1_000_000_000
"""Bytes of an image inside a larger file. It is read into memory as a whole."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of an image are, and what tells whether they are still the same."""

    path: Path
    """The file."""
    size: int
    """Bytes of the image."""
    mtime_ns: int
    """When the file was changed, in nanoseconds since 1970."""
    member: str | None = None
    """The image's name inside the file, or None if the image is the whole file."""
    start: int = 0
    """Where the image begins in the file."""

    @classmethod
    def of_file(cls, path: Path) -> Place:
        """The image that is the whole file ``path``. Raises ValueError if it is none, or empty."""
        try:
            status = path.stat()
        except FileNotFoundError:
            raise ValueError("no such file") from None
        except OSError as error:
            raise ValueError((error.strerror or str(error)).lower()) from error
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")
        if not status.st_size:
            raise ValueError("the file has zero bytes")
        return cls(path, status.st_size, status.st_mtime_ns)

    @classmethod
    def of_part(cls, path: Path, mtime_ns: int, member: str, start: int, size: int) -> Place:
        """The image ``member`` in the file ``path``. Raises ValueError if it has no bytes, or too many."""
        if not size:
            raise ValueError("the image has zero bytes")
        if size > MAX_PART:
            raise ValueError(f"the image has {size:,} bytes; at most {MAX_PART:,} are read")
        return cls(path, size, mtime_ns, member, start)

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    @property
    def name(self) -> str:
        """The image's name without its folder, so that a data set may be moved."""
        return self.path.name if self.member is None else f"{self.path.name}/{self.member}"

    def source(self) -> Path | io.BytesIO:
        """What Pillow opens: the path of a file, or a part's bytes. Raises OSError."""
        return self.path if self.member is None else io.BytesIO(self.read())

    def sha256(self) -> str:
        """A hash of the image's bytes. Raises OSError as :meth:`read` does."""
        if self.member is not None:
            return hashlib.sha256(self.read()).hexdigest()
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self) -> bytes:
        """The image's bytes. Raises OSError if the file cannot be read or has become shorter."""
        if self.member is None:
            return self.path.read_bytes()
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"the file ends {self.size - len(content)} bytes before the image does")
        return content
