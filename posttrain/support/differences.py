"""Lists where two trees of settings differ, such as two recipes or two result cards."""

from __future__ import annotations

from collections.abc import Collection, Iterator

SHOWN = 60
"""A value is shown in at most this many characters."""


def differences(before: object, now: object, free: Collection[str] = (), path: str = "") -> Iterator[str]:
    """``a.b.0 (was 1, now 2)`` for each difference, except at or below one of the ``free`` paths.

    Of two blocks with another ``type`` only the types are named. Long values are cut.
    """
    if path in free:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        keys = ["type"] if before.get("type") != now.get("type") else before | now
        for key in keys:
            yield from differences(before.get(key), now.get(key), free, f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            yield from differences(a, b, free, f"{path}.{i}")
    elif before != now:
        yield f"{path} (was {_shown(before)}, now {_shown(now)})"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
