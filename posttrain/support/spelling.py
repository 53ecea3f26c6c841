"""Which of the allowed words did the user mean?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def meant(word: object, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no allowed word is near.

    Words that differ in case and separators only come first.
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
