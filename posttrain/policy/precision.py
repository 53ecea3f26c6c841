"""Maps a recipe's ``precision`` to the dtype of autocast."""

from __future__ import annotations

import torch

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
"""``precision`` -> the dtype of autocast around the transformer's forward; None is no autocast."""
