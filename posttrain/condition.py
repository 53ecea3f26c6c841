"""Conditions: the encoded prompts, as named tensors, that the velocity depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Condition = dict[str, Tensor]
"""Tensor name -> (n, ...), one row per sample: the form that the model's velocity takes."""

EMPTY_PROMPT = 0
"""Row of the empty prompt in :class:`Conditions`; guidance and condition dropout use it."""


@dataclass(frozen=True)
class Conditions:
    """A table of encoded prompts. Each prompt is stored once; row 0 is the empty prompt."""

    table: Condition
    """Tensor name -> (1 + number of prompts, ...)."""

    def rows(self, index: Tensor) -> Condition:
        """The condition of n samples, given ``index`` (n,) int64: each sample's row in the table."""
        return {name: tensor[index] for name, tensor in self.table.items()}

    def empty(self, count: int) -> Condition:
        """The empty prompt's condition for ``count`` samples (a view, not a copy)."""
        return {
            name: tensor[EMPTY_PROMPT : EMPTY_PROMPT + 1].expand(count, *tensor.shape[1:])
            for name, tensor in self.table.items()
        }


def concatenated(first: Condition, second: Condition) -> Condition:
    """The rows of ``first`` followed by the rows of ``second``."""
    return {name: torch.cat([first[name], second[name]]) for name in first}
