"""Tells paths from names, where a recipe's field takes either."""

from __future__ import annotations


def is_path(text: str, *, hub: bool = False) -> bool:
    """Whether ``text`` is written as a path: it begins with ``.``, ``/`` or ``~``, or has a slash.

    A name has no slash, but for those of a ``hub``, which are ``owner/name``: there the beginning decides.
    """
    return text.startswith((".", "/", "~")) or ("/" in text and not hub)
