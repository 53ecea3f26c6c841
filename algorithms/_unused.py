"""Refuses options that would do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from posttrain.algorithm import Algorithm
from posttrain.registry import field_error

A = TypeVar("A", bound=Algorithm)


def used(algorithm: A, unused: Mapping[str, str | bool | None]) -> A:
    """``algorithm``, if none of its options that do nothing is set to another value than its default.

    ``unused``: an option -> why it has no effect, to follow those words; false where it has one. Raises
    field_error for the first that is set.
    """
    for name, why in unused.items():
        if why and getattr(algorithm, name) != type(algorithm).model_fields[name].default:
            raise field_error((name,), f"has no effect {why}")
    return algorithm
