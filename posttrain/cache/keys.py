"""Names the stores and entries of the cache by hashes of everything that an encoding depends on.

A store's name has a hash of the encoder's weights, its settings, and whatever affects the last bits of its
arithmetic. An entry's key is a hash of the prompt or image.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch

from posttrain.model import EncoderName, FlowModel

FORMAT = 3
"""Version of the stored form; increase it when equal inputs would be kept as other tensors."""
PACKAGES: dict[EncoderName, tuple[str, ...]] = {
    "prompts": ("torch", "diffusers", "transformers", "tokenizers"),
    "images": ("torch", "diffusers", "pillow"),
}
"""Packages of which another version may compute other bits."""


def digest(*parts: object) -> str:
    """A hash, in 32 hexadecimal digits, of the list of ``parts``: texts, numbers and truth values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def store_identity(
    kind: str, dtype: str, model: FlowModel, encoder: EncoderName
) -> tuple[str, dict[str, Any]]:
    """A store's folder name, and a readable record of what was hashed.

    Raises ModelError if ``model`` does not say what its encodings depend on.
    """
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
    """The known settings that decide how sums are ordered and rounded on ``device``."""
    if device.type == "cuda":
        tf32 = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
        return {"device": torch.cuda.get_device_name(device), "tf32": tf32}
    if device.type == "cpu":
        return {"device": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"device": device.type}
