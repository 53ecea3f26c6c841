"""Distinguishes paths from names in fields that take either."""

from __future__ import annotations


def is_path(text: str, *, hub: bool = False) -> bool:
    """Whether ``text`` is a path: it begins with ``.``, ``/`` or ``~``, or contains a slash.

    In a field that takes ``hub`` names (``owner/name``), only the beginning counts.
    """
    return text.startswith((".", "/", "~")) or ("/" in text and not hub)
