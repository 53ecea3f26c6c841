"""In which short forms may a recipe give rewards?"""

from __future__ import annotations

from typing import Any


def reward_blocks(value: Any) -> Any:
    """``value`` as a list of reward blocks, each with its ``type``.

    A name, a list of names and blocks, and a mapping from names to a weight, a block of settings or
    nothing are all taken, and ``module:function`` is the name of a function of one's own; anything else
    is returned as it is, for the schema to refuse. Raises ValueError for a block that does not say which
    reward it is: a schema that knows only one would take it for that.
    """
    if isinstance(value, str):
        return [_block(value, None)]
    if isinstance(value, dict):
        if "type" in value:
            return [value]
        return [_block(name, settings) for name, settings in value.items()]
    if isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, dict) and "type" not in item:
                raise ValueError(f"item {i} does not say which reward it is: give it a 'type'")
        return [_block(item, None) if isinstance(item, str) else item for item in value]
    return value


def _block(name: Any, settings: Any) -> Any:
    kind = {"type": "callable", "function": name} if ":" in str(name) else {"type": name}
    if settings is None:
        return kind
    return {**kind, **(settings if isinstance(settings, dict) else {"weight": settings})}
