"""Lists the differences between two nested values, such as two recipes or two result cards."""

from __future__ import annotations

from collections.abc import Collection, Iterator


def differences(before: object, now: object, free: Collection[str] = (), path: str = "") -> Iterator[str]:
    """``a.b.0 (was 1, now 2)`` for each difference, except at or below one of the ``free`` paths."""
    if path in free:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from differences(before.get(key), now.get(key), free, f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            yield from differences(a, b, free, f"{path}.{i}")
    elif before != now:
        yield f"{path} (was {before!r}, now {now!r})"
