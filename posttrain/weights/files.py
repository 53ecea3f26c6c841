"""Reads the headers of weight files, and hashes files and tensors."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError

if TYPE_CHECKING:
    import torch


def header_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Read name -> shape of the weights in ``folder`` from the headers of its safetensors files.

    Returns None if the folder has no such file. Raises ModelError for a file that is not a complete
    safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= file.stat().st_size - 8:
                pointer = " (it is a git-lfs pointer: run `git lfs pull`)" if start == b"version " else ""
                raise ModelError(f"{str(file)!r} is no safetensors file, or only a part of one{pointer}")
            header = json_object(stream.read(length), file)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes or None


def json_object(content: bytes, file: Path) -> dict[str, Any]:
    """Parse ``content``, the bytes of ``file``. Raises ModelError if it is not a JSON object."""
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{str(file)!r} cannot be read: it is no JSON object")
    return parsed


def sha256(file: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(folder: Path, names: Iterable[str]) -> str:
    """The SHA-256 over the names and contents of all files of the components ``names`` in a pipeline's
    ``folder``."""
    digest = hashlib.sha256()
    for name in sorted(names):
        for file in sorted(p for p in (folder / name).rglob("*") if p.is_file()):
            status = file.stat()
            file_hash = _sha256_once(file, status.st_size, status.st_mtime_ns)
            digest.update(f"{file.relative_to(folder).as_posix()} {file_hash}\n".encode())
    return digest.hexdigest()


@functools.cache
def _sha256_once(file: Path, size: int, mtime_ns: int) -> str:
    """The SHA-256 of ``file``, computed once per process while its size and time stay the same.

    Every stage loads the text encoders, and hashing their 10 GB each time would take minutes.
    """
    del size, mtime_ns
    return sha256(file)


def hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 over name, shape and float32 values of each tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().float().cpu().contiguous().numpy()
        digest.update(values.data)  # a view, so that a large model is not copied
    return digest.hexdigest()
