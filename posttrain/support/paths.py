"""Distinguishes paths from names in fields that take either, and asks for paths that no file can have.

pathlib raises errors for a name that is too long, a folder that may not be entered, or an unknown ``~user``.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path


def is_path(text: str, *, hub: bool = False) -> bool:
    """Whether ``text`` is a path: it begins with ``.``, ``/`` or ``~``, or contains a slash.

    In a field that takes ``hub`` names (``owner/name``), only the beginning counts.
    """
    return text.startswith((".", "/", "~")) or ("/" in text and not hub)


def expanded(path: str | Path) -> Path:
    """``path`` with the home folder in place of ``~``; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))


def is_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder. A path that no file can have, or that may not be read, is none."""
    return os.path.isdir(path)


def file_problem(file: Path) -> str | None:
    """Why ``file`` cannot be read as a file; None if it exists."""
    if is_folder(file):
        return f"{str(file)!r} is a folder, a file is expected"
    if not is_file(file):
        where = f"looked at {file.absolute()}; relative paths start at the current folder"
        return f"no file {str(file)!r} ({where})"
    return None


def folder_problem(folder: Path) -> str | None:
    """Why ``folder`` cannot be read as a folder; None if it exists."""
    return None if is_folder(folder) else f"no folder {str(folder)!r} (looked at {folder.absolute()})"


def in_the_way(folder: Path) -> str | None:
    """Why ``folder`` cannot be made: it, or what it is to lie in, is a file. None if it exists or can be."""
    path = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    return f"{str(path)!r} is a file, a folder is expected" if is_file(path) else None


def is_file(path: str | Path) -> bool:
    """Whether ``path`` is a file. A path that no file can have, or that may not be read, is none."""
    return os.path.isfile(path)


def default_folder() -> Path:
    """``posttrain`` in the user's cache folder, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the specification says to ignore relative values
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "posttrain"


def first_free(path: Path) -> Path:
    """``path`` if nothing is there, else the first of ``path-2``, ``path-3`` and so on where nothing is."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not os.path.lexists(path) else next(p for p in numbered if not os.path.lexists(p))
