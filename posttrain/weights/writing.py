"""Writes safetensors files one tensor at a time, in any precision; equal tensors make equal files.

The library's own writer takes all tensors of a file at once, and orders its metadata at random.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ModelError
from posttrain.weights.fitting import described, is_finite
from posttrain.weights.hugging_face import explained
from posttrain.weights.network import advice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's name of a dtype -> that of the safetensors format."""
SHARD = "10GB"
"""The most bytes of weights in one of a network's files, unless one weight has more: diffusers' default."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is read when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def dtype_in(self, file_dtype: torch.dtype | None) -> torch.dtype:
        """Its precision in a file whose floats have ``file_dtype``, if that is given."""
        return file_dtype if file_dtype and self.dtype.is_floating_point else self.dtype

    def bytes_in(self, file_dtype: torch.dtype | None) -> int:
        """Its bytes in such a file."""
        return math.prod(self.shape) * self.dtype_in(file_dtype).itemsize

    def then(self, change: Callable[[Tensor], Tensor]) -> Entry:
        """The entry whose tensor is ``change`` of this one's, of the same shape and dtype."""
        return replace(self, read=lambda: change(self.read()))


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """The entries of tensors in memory."""
    return {n: Entry(tuple(t.shape), t.dtype, lambda t=t: t.detach()) for n, t in tensors.items()}


def entries_in(files: Iterable[Path]) -> dict[str, Entry]:
    """The entries of the weights in ``files``, of safetensors or torch's own format (``.bin``). Raises
    ModelError for a file that cannot be read."""
    import torch
    from safetensors import safe_open

    found: dict[str, Entry] = {}
    for file in files:
        if file.suffix != ".safetensors":
            mmap = zipfile.is_zipfile(file)  # older files are not
            with explained(str(file)):
                found |= entries_of(torch.load(file, map_location="cpu", weights_only=True, mmap=mmap))
            continue
        with explained(str(file)):
            opened = safe_open(file, framework="pt")
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            dtype = next(torch_name for torch_name, own in NAMES.items() if own == part.get_dtype())
            found[name] = Entry(
                tuple(part.get_shape()),
                getattr(torch, dtype),
                lambda opened=opened, name=name: opened.get_tensor(name),
            )
    return found


def write_network(
    folder: Path, name: str, entries: Mapping[str, Entry], dtype: torch.dtype | None = None
) -> None:
    """Write a network's ``entries`` to the file ``name`` in ``folder``, as :func:`write_tensors` does.

    If they have more than :data:`SHARD`, they go to several files beside an index, as diffusers and
    transformers load them.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(sorted(entries.items())),
        get_storage_size=lambda entry: entry.bytes_in(dtype),
        filename_pattern=name.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=SHARD,
    )
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: entries[name] for name in names}, dtype)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_tensors(
    file: Path,
    entries: Mapping[str, Entry],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``entries`` to the new ``file``; floats become ``dtype``, if it is given. Holds one tensor.

    Raises ModelError, and leaves no file, for a weight that is not finite in ``dtype``.
    """
    wanted = {name: entry.dtype_in(dtype) for name, entry in entries.items()}
    # the widest numbers first, so that each begins at a multiple of its size
    order = sorted(entries, key=lambda name: (-wanted[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    end = 0
    for name in order:
        start, end = end, end + entries[name].bytes_in(dtype)
        kind = NAMES[str(wanted[name]).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(entries[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    infinite, overflowing = [], []
    with file.open("xb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            own = entries[name].read().cpu()
            tensor = own.to(wanted[name])
            if not is_finite(tensor):
                (overflowing if is_finite(own) else infinite).append(name)
            opened.write(_bytes(tensor))
    if problems := described(infinite=infinite, overflowing=overflowing):
        file.unlink()
        told = dtype or next(wanted[name] for name in (*infinite, *overflowing))
        raise ModelError(f"the weights cannot be written as {told}: {problems}{advice(problems, told)}")


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
