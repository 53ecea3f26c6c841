"""Encodes prompts, each distinct one once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.condition import Conditions
from posttrain.flow_model import FlowModel, conditions_of


def encode(model: FlowModel, prompts: Sequence[str]) -> tuple[Conditions, Tensor]:
    """The conditions of the empty prompt (row 0) and of each distinct prompt, and the row of each prompt,
    (n,) int64.

    Distinct prompts are encoded once, or read from the model's cache."""
    distinct = list(dict.fromkeys(prompts))
    cache, every = model.prompt_cache, ["", *distinct]
    encoded = conditions_of(model, every) if cache is None else cache.conditions(every)
    row = {prompt: i + 1 for i, prompt in enumerate(distinct)}
    rows = torch.tensor([row[p] for p in prompts], device=model.device)
    return Conditions(encoded), rows
