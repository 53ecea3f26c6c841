"""Writes one process's pieces of a training state to a safetensors file, and maps such a file into memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from posttrain.engine.manifest import Damage, File, Hashed
from posttrain.policy.piece import Piece

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
"""As the format names them."""
ALIGNMENT = 8


def write_pieces(file: Path, pieces: Mapping[str, Piece]) -> File:
    """Write ``pieces`` to the new ``file``, one after the other; returns its size and hash.

    The file's metadata has shape and start of each piece. The safetensors library would need all tensors in
    the CPU's memory at once, and the hash a second reading. Raises OSError.
    """
    # numbers of more bytes come first, so that all lie at multiples of their size
    ordered = sorted(pieces.items(), key=lambda item: (-item[1].values.itemsize, item[0]))
    places = {path: json.dumps({"shape": [*p.shape], "start": p.start}) for path, p in ordered}
    header: dict[str, object] = {"__metadata__": places}
    end = 0
    for path, piece in ordered:
        begin, end = end, end + piece.values.nbytes
        kind = DTYPES[piece.values.dtype]
        header[path] = {"dtype": kind, "shape": [*piece.values.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // ALIGNMENT) * ALIGNMENT)
    with file.open("wb") as opened:
        hashed = Hashed(opened)
        hashed.write(struct.pack("<Q", len(text)))
        hashed.write(text)
        for _, piece in ordered:
            hashed.write(piece.values.detach().cpu().flatten().view(torch.uint8).numpy())
        opened.flush()
        os.fsync(opened.fileno())  # by each process, before the main one does it for all files
    return hashed.described()


def read_pieces(file: Path) -> dict[str, Piece]:
    """What :func:`write_pieces` wrote, memory-mapped: numbers are read when they are used. Raises Damage."""
    try:
        with safe_open(file, framework="pt") as opened:
            places = {path: json.loads(text) for path, text in opened.metadata().items()}
            return {
                path: Piece(opened.get_tensor(path), torch.Size(place["shape"]), place["start"])
                for path, place in sorted(places.items())  # the library's order is a random one
            }
    except Exception as error:
        raise Damage(f"{file.name} cannot be read: {error}") from error
