"""Compares the names and shapes of weights that were read with those that a network has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 3
"""Differences that are named; the others are counted."""


def misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """How ``state`` does not fit a network whose weights are ``own``; None where names and shapes are equal.

    All must fit: a layer that is left as it was made, at random, would still give images and scores.
    """
    problems = [f"no {name}" for name in own if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} of shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more if problems else None
