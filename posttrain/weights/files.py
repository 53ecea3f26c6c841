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
    """Name -> shape of the weights in ``folder``, from the headers of its safetensors files alone; None where
    there are none. Raises ModelError for a file that is no safetensors file."""
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
    """The JSON object in ``content``, which was read from ``file``. Raises ModelError where it is none."""
    try:
        read = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise ModelError(f"{str(file)!r} cannot be read: it is no JSON object")
    return read


def content_hash(folder: Path, names: Iterable[str]) -> str:
    """The sha256 over the names and contents of all files of the components ``names`` of a pipeline."""
    digest = hashlib.sha256()
    for name in sorted(names):
        for file in sorted(p for p in (folder / name).rglob("*") if p.is_file()):
            status = file.stat()
            inside = _file_hash(file, status.st_size, status.st_mtime_ns)
            digest.update(f"{file.relative_to(folder).as_posix()} {inside}\n".encode())
    return digest.hexdigest()


@functools.cache
def _file_hash(file: Path, size: int, mtime_ns: int) -> str:
    """The file's sha256, computed once per process and state of the file: every stage loads the text
    encoders, which have 10 GB."""
    del size, mtime_ns
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """The sha256 over name, shape and float32 values of each tensor, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().float().cpu().contiguous().numpy()
        digest.update(values.data)  # a view: a large model's bytes are not copied
    return digest.hexdigest()
