"""Which optimizer takes the steps?"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from posttrain.optim.settings import OptimizerName, Train


def problem(name: OptimizerName) -> str | None:
    """Why there is no such optimizer on this machine; None if there is."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install 'posttrain[8bit]'"
    return None


def optimizer_of(settings: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over ``parameters`` (Loshchilov & Hutter 2019, arXiv:1711.05101), fused where the device has it;
    or with its moments in 8 bits, in blocks of 256 with a scale each (Dettmers et al. 2022,
    arXiv:2110.02861), those of tensors of fewer than 4096 numbers aside."""
    kept = list(parameters)
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(kept, **options)
    return torch.optim.AdamW(kept, **options, fused=kept[0].device.type in ("cpu", "cuda"))
