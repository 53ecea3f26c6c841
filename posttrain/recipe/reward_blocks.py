"""Expands the short forms in which a recipe may give rewards into a list of blocks."""

from __future__ import annotations

from typing import Any

from posttrain.support import user_code


def reward_blocks(value: Any) -> Any:
    """``value`` as a list of reward blocks, each with its ``type``.

    Accepted are a name, a list of names and blocks, and a mapping from each name to a weight, a block of
    settings, or nothing. ``module:function`` names a Python function of the user, ``module:Class`` a class of
    rewards. Any other value is returned unchanged, and the schema refuses it. Raises ValueError if a block in
    a list has no ``type``.
    """
    if isinstance(value, str):
        return [_block(value, None)]
    if isinstance(value, dict):
        if "type" in value:
            return [value]
        return [_block(name, settings) for name, settings in value.items()]
    if isinstance(value, list):
        for i, item in enumerate(value):
            # the schema cannot tell: with one reward installed it would take every block for that reward
            if isinstance(item, dict) and "type" not in item:
                raise ValueError(f"item {i} does not say which reward it is: give it a 'type'")
        return [_block(item, None) if isinstance(item, str) else item for item in value]
    return value


def _block(name: Any, settings: Any) -> Any:
    own_function = ":" in str(name) and not user_code.is_class(str(name))
    block = {"type": "callable", "function": name} if own_function else {"type": name}
    if settings is None:
        return block
    return {**block, **(settings if isinstance(settings, dict) else {"weight": settings})}
