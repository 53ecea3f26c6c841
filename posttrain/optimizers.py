"""Which optimizer takes the steps?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from posttrain.train_settings import Train


def optimizer_of(settings: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over ``parameters``, fused where the device has it."""
    kept = list(parameters)
    return torch.optim.AdamW(
        kept,
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=kept[0].device.type in ("cpu", "cuda"),
    )
