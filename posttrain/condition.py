"""What the velocity is conditioned on: encoded prompts, as named tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Condition = dict[str, Tensor]
"""Name -> (n, ...): one row per sample, as the model's velocity takes them."""

EMPTY_PROMPT = 0
"""The row of :class:`Conditions` that holds the empty prompt, for guidance and condition dropout."""


@dataclass(frozen=True)
class Conditions:
    """A table of encoded prompts, each stored once; row 0 is the empty prompt."""

    table: Condition
    """Name -> (1 + prompts, ...)."""

    def rows(self, index: Tensor) -> Condition:
        """The conditions at rows ``index`` (n,)."""
        return {name: tensor[index] for name, tensor in self.table.items()}

    def empty(self, count: int) -> Condition:
        """The empty prompt's condition, ``count`` times (a view, not a copy)."""
        return {
            name: tensor[EMPTY_PROMPT : EMPTY_PROMPT + 1].expand(count, *tensor.shape[1:])
            for name, tensor in self.table.items()
        }


def concatenated(first: Condition, second: Condition) -> Condition:
    """The rows of ``first``, then those of ``second``."""
    return {name: torch.cat([first[name], second[name]]) for name in first}
