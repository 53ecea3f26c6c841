"""Reads the headers of weight files, and hashes files and tensors."""

from __future__ import annotations

import functools
import hashlib
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import DamagedError, ModelError
from posttrain.support import records

if TYPE_CHECKING:
    import torch

PLAIN = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""The file names that diffusers and transformers look for, unless a variant is asked for."""
PLAIN_TORCH = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
"""The same in torch's own format."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files from which the weights of the network in ``folder`` are read: those of the plain
    name, since a folder may have others of lower precision beside them; else all files. Raises ModelError for
    a shard that is missing.
    """
    return _plain(folder, *PLAIN) or sorted(folder.glob("*.safetensors"))


def component_weights(folder: Path) -> list[Path]:
    """The files from which diffusers or transformers reads the weights of the component in ``folder``: of
    safetensors or, without one of the plain name, of torch's own format. Raises ModelError for a shard that
    is missing."""
    return _plain(folder, *PLAIN) or _plain(folder, *PLAIN_TORCH)


def _plain(folder: Path, of_diffusers: str, of_transformers: str) -> list[Path]:
    """The file of a plain name in ``folder``, or the shards of its index, as its library takes them."""
    # where both are there, diffusers takes the index and transformers the file
    indices = [f"{name}.index.json" for name in (of_diffusers, of_transformers)]
    for name in (indices[0], of_diffusers, of_transformers, indices[1]):
        if (file := folder / name).is_file():
            return _shards(file) if name in indices else [file]
    return []


def _shards(index: Path) -> list[Path]:
    names = json_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{str(index)!r} cannot be read: it has no 'weight_map' of file names")
    shards = [index.parent / name for name in sorted(set(names.values()))]
    if lost := [shard.name for shard in shards if not shard.is_file()]:
        raise ModelError(f"{str(index.parent)!r} lacks {', '.join(lost)}, which {index.name} lists")
    return shards


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype, as safetensors names it, and shape of the weights in ``folder``, from the headers.

    Empty without a safetensors file. Raises ModelError for a file that is not a complete safetensors file,
    and for a weight that two files hold: which of them is taken would be chance.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in weight_files(folder):
        header = file_header(file)
        if twice := sorted(found.keys() & header.keys()):
            raise ModelError(f"{str(file)!r} holds {twice[0]}, which another file of the folder holds too")
        found |= header
    return found


def file_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """As :func:`headers`, of one file. Raises ModelError for one that is not a complete safetensors file."""
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            size = file.stat().st_size
            if not 0 < length <= size - 8:
                pointer = " (it is a git-lfs pointer: run `git lfs pull`)" if start == b"version " else ""
                raise ModelError(f"{str(file)!r} is no safetensors file, or only a part of one{pointer}")
            entries = json_object(stream.read(length), file)
        entries.pop("__metadata__", None)
        found = {name: (str(e["dtype"]), tuple(e["shape"])) for name, e in entries.items()}
        end = max((int(e["data_offsets"][1]) for e in entries.values()), default=0)
    except (OSError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{str(file)!r} cannot be read: {error}") from error
    if 8 + length + end != size:
        raise ModelError(f"{str(file)!r} has {size} bytes, but its header describes {8 + length + end}")
    return found


def header_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Name -> shape of the weights in ``folder``; None if it has no safetensors file. Raises ModelError as
    :func:`headers` does."""
    return {name: shape for name, (_, shape) in headers(folder).items()} or None


def bytes_beside(component: str, files: Mapping[str, Path], itemsize: int) -> int | None:
    """The bytes of ``files``, by name, outside the folder ``component``, once floats have ``itemsize`` bytes.

    None if there is no file. Raises ModelError for a damaged safetensors file.
    """
    beside = [file for name, file in files.items() if not name.startswith(f"{component}/")]
    return sum(_bytes_in(file, itemsize) for file in beside) if files else None


def _bytes_in(file: Path, itemsize: int) -> int:
    size = file.stat().st_size
    for dtype, shape in file_header(file).values() if file.suffix == ".safetensors" else ():
        if bits := re.fullmatch(r"B?F(\d+).*", dtype):
            size += math.prod(shape) * (itemsize - int(bits[1]) // 8)
    return size


def json_object(content: bytes, file: Path) -> dict[str, Any]:
    """Parse ``content``, the bytes of ``file``. Raises ModelError if it is not a JSON object."""
    try:
        return records.json_object(content, str(file))
    except DamagedError as error:
        raise ModelError(str(error)) from error


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
            file_hash = sha256_once(file, status.st_size, status.st_mtime_ns)
            digest.update(f"{file.relative_to(folder).as_posix()} {file_hash}\n".encode())
    return digest.hexdigest()


@functools.cache
def sha256_once(file: Path, size: int, mtime_ns: int) -> str:
    """The SHA-256 of ``file``, computed once per process while its ``size`` and ``mtime_ns`` stay the same.

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
