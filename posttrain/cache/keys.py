"""What is an encoding a function of? Under whose name is it kept?

A store is named by a hash of everything but the prompt or image: the encoder's weights, its settings, and
what decides the last bits of its arithmetic. An entry's key is a hash of the prompt or image itself.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch

from posttrain.model import EncoderName, FlowModel

FORMAT = 1
"""Raised whenever the same inputs would be kept as other tensors."""
PACKAGES: dict[EncoderName, tuple[str, ...]] = {
    "prompts": ("torch", "diffusers", "transformers", "tokenizers"),
    "images": ("torch", "diffusers", "pillow"),
}
"""Those whose next version may compute other bits."""


def digest(*parts: object) -> str:
    """32 hexadecimal digits for texts, numbers and truth values; parts are kept apart in the hash."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def described(kind: str, dtype: str, model: FlowModel, encoder: EncoderName) -> tuple[str, dict[str, Any]]:
    """A store's name and, for people, what the name stands for. Raises ModelError as the model's identity."""
    about = {
        "kind": kind,
        "dtype": dtype,
        "encoder": model.identity(encoder),
        "numerics": numerics(model.device),
        "versions": {name: version(name) for name in PACKAGES[encoder]},
        "format": FORMAT,
    }
    return f"{kind}-{digest(json.dumps(about, sort_keys=True))[:16]}", about


def numerics(device: torch.device) -> dict[str, Any]:
    """What decides how sums are ordered and rounded on ``device``, as far as it can be told."""
    if device.type == "cuda":
        tf32 = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
        return {"device": torch.cuda.get_device_name(device), "tf32": tf32}
    if device.type == "cpu":
        return {"device": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"device": device.type}
