"""Suggests the allowed word that a misspelt word was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def meant(word: object, allowed: Iterable[str]) -> str:
    """The hint `` (did you mean 'x'?)``, or an empty string if no allowed word is near.

    A word that differs only in case or separators is preferred.
    """
    known = list(allowed)
    plain = _plain(str(word))
    near = [k for k in known if _plain(k) == plain]
    near += difflib.get_close_matches(plain, [_plain(k) for k in known], 1, 0.6)
    if not near:
        return ""
    best = near[0] if near[0] in known else next(k for k in known if _plain(k) == near[0])
    return f" (did you mean {best!r}?)"


def _plain(word: str) -> str:
    return "".join(c for c in word.lower() if c.isalnum())
