"""Makes the optimizer that a stage names."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from posttrain.optim.settings import OptimizerName, Train


def problem(name: OptimizerName) -> str | None:
    """Why the optimizer is not available on this machine; None if it is."""
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install 'posttrain[8bit]'"
    return None


def optimizer_of(settings: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of ``settings`` over ``parameters``.

    ``adamw`` is AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused if the device supports it.
    ``adamw8bit`` keeps the moments in 8 bits, with one scale for each block of 256 numbers (Dettmers et al.
    2022, arXiv:2110.02861); tensors of fewer than 4096 numbers keep theirs in 32 bits.
    """
    trained = list(parameters)
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.betas[0], settings.betas[1]),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, **options)
    return torch.optim.AdamW(trained, **options, fused=trained[0].device.type in ("cpu", "cuda"))
