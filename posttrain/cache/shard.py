"""Reads one shard of a store: a memory-mapped safetensors file whose metadata describes its entries."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from posttrain.weights.fitting import is_finite

Entry = dict[str, Tensor]
"""Name -> tensor."""


class Shard:
    """An open shard. It stays readable when another process removes the file.

    Raises SafetensorError, ValueError, KeyError, TypeError, AttributeError or OSError if the file is damaged,
    and ValueError if it was written for another store.
    """

    def __init__(self, file: Path) -> None:
        self.tensors = safe_open(file, framework="pt")
        about = json.loads((self.tensors.metadata() or {})["posttrain"])
        self.checksums: dict[str, int] = about["checksums"]
        self.dtypes: dict[str, str] = about["computed"]
        """Tensor name -> the dtype in which it was computed."""
        if (store := about["store"]) != file.parent.name:  # keys are equal in all stores
            raise ValueError(f"it belongs to the store {str(store)[:100]!r}")
        if unknown := [d for d in self.dtypes.values() if not isinstance(getattr(torch, d), torch.dtype)]:
            raise ValueError(f"{unknown[0]!r} is no dtype")
        if set(self.tensors.keys()) != {f"{key}/{name}" for key in self.checksums for name in self.dtypes}:
            raise ValueError("its tensors are not those that it lists")

    def read(self, key: str) -> Entry:
        return {name: self.tensors.get_tensor(f"{key}/{name}") for name in self.dtypes}


def fault(key: str, entry: Entry, shard: Shard) -> str | None:
    """What is wrong with the ``entry`` of ``key`` in ``shard``; None if it is as it was written."""
    if checksum(key, entry, shard.dtypes) != shard.checksums[key]:
        return "its content does not have the checksum that was written with it"
    return None if all(map(is_finite, entry.values())) else "an encoding in it is not finite"


def checksum(key: str, entry: Entry, dtypes: Mapping[str, str]) -> int:
    """The CRC-32 of an entry: its key, names, shapes, values, and dtypes as stored and as computed."""
    value = zlib.crc32(key.encode())
    for name, tensor in sorted(entry.items()):
        identity = f"{name} {tensor.dtype} {dtypes[name]} {tuple(tensor.shape)}"
        value = zlib.crc32(identity.encode(), value)
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value
