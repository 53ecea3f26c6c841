"""A store of named tensors in files that any number of processes may read and add to at once.

A store is a folder of *shards*: memory-mapped safetensors files that appear by a rename and never change. An
entry is a few tensors under a key. Its checksum is in the shard's metadata, and a process verifies it when it
first reads the entry. If two processes write one entry at once, the store has it twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.cache.room import Room, writing
from posttrain.support.files import aside, publish

ABOUT = "about.json"
"""A readable record of what the entries depend on."""
SHARD_BYTES, SHARD_ENTRIES = 64 * 2**20, 1024
"""A shard is written at either limit. It is the most that a kill can lose, and the unit of removal."""
STALE_SECONDS = 3600
"""An unfinished file older than this was left by a killed process: a shard is written in seconds."""
HEADER_BYTES = 512
"""Upper bound of what an entry takes in its shard's header."""

Entry = dict[str, Tensor]
"""Name -> tensor."""


class Store:
    """The entries in the folder ``name`` of ``room``.

    Tensors of a wider dtype than ``dtype``, if one is given, are rounded to it. ``about`` is written beside
    them as a readable record. ``warn`` is called with a message for each damaged file. Raises PosttrainError
    if the folder cannot be written.
    """

    def __init__(
        self,
        room: Room,
        name: str,
        about: Mapping[str, object],
        dtype: torch.dtype | None,
        warn: Callable[[str], None],
    ) -> None:
        self.room, self.folder, self.dtype, self.warn = room, room.root / name, dtype, warn
        self._shards: dict[Path, _Shard] = {}
        self._shard_of: dict[str, Path] = {}
        self._verified: set[str] = set()
        self._pending: dict[str, Entry] = {}
        self._pending_bytes = 0
        self._dtypes: dict[str, str] = {}
        self._unremovable: set[Path] = set()
        self._about = json.dumps(about, indent=2)
        with writing(self.folder):
            self._make_folder()
            _remove_stale(self.folder)
        self.refresh()

    def refresh(self) -> None:
        """Open the shards that other processes have written since."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file in self._shards or file in self._unremovable:
                continue
            try:
                self._shards[file] = _Shard(file)
            except FileNotFoundError:
                continue  # another process removed it
            except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
                self._discard(file, str(error))
                continue
            for key in self._shards[file].checksums:
                self._shard_of.setdefault(key, file)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of or key in self._pending

    def use(self, keys: Iterable[str]) -> None:
        """Mark the shards that hold ``keys`` as used now. From then on this process does not remove them."""
        for file in {self._shard_of[key] for key in keys if key in self._shard_of}:
            self.room.use(file)

    def read(self, key: str) -> Entry | None:
        """The tensors of ``key``, on the CPU, in the dtypes in which they were computed.

        None if there is no such entry or it is damaged; a shard with a damaged entry is reported and removed.
        """
        if key in self._pending:
            return _as_computed(self._pending[key], self._dtypes)
        if key not in self._shard_of:
            self.refresh()
        while (file := self._shard_of.get(key)) is not None:
            shard = self._shards[file]
            entry = shard.read(key)
            if key in self._verified or checksum(key, entry, shard.dtypes) == shard.checksums[key]:
                self._verified.add(key)
                return _as_computed(entry, shard.dtypes)
            self._discard(file, "its content does not have the checksum that was written with it")
        return None

    def add(self, key: str, entry: Entry) -> None:
        """Add ``entry``; :meth:`flush` writes it. All entries of a store have the same tensor names."""
        rounded_entry = {
            name: rounded(t.detach(), self.dtype).cpu().contiguous() for name, t in entry.items()
        }
        self._dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in entry.items()}
        self._pending[key] = rounded_entry
        self._pending_bytes += size_of(entry, self.dtype)
        if self._pending_bytes >= SHARD_BYTES or len(self._pending) >= SHARD_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Write the added entries to a shard, except those that another process has written meanwhile."""
        if not self._pending:
            return
        self.refresh()
        if new := {key: entry for key, entry in self._pending.items() if key not in self._shard_of}:
            self._write(new)
            self.refresh()
        self._pending, self._pending_bytes = {}, 0

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / ABOUT).is_file():
            with aside(self.folder / ABOUT, shared=True) as part:
                part.write_text(self._about)
                publish(part, self.folder / ABOUT)

    def _write(self, entries: Mapping[str, Entry]) -> None:
        checksums = {key: checksum(key, entry, self._dtypes) for key, entry in entries.items()}
        about = json.dumps({"checksums": checksums, "computed": self._dtypes}, sort_keys=True)
        name = hashlib.blake2b(about.encode(), digest_size=12).hexdigest()
        file = self.folder / f"{name}.safetensors"
        with writing(self.folder), aside(file, shared=True) as part:
            self._make_folder()  # the cache may have been cleared since the start
            # safetensors refuses tensors that share memory, as the rows of one batch do
            tensors = {f"{key}/{n}": t.clone() for key, entry in entries.items() for n, t in entry.items()}
            save_file(tensors, part, metadata={"posttrain": about})
            # safetensors makes files that only their owner can read; use the permissions of other files
            part.chmod((self.folder / ABOUT).stat().st_mode & 0o777)
            self.room.publish(part, file)

    def _discard(self, file: Path, why: str) -> None:
        """Forget and remove a damaged shard. Its entries are missing from then on, and are encoded again."""
        self.warn(f"the cache file {str(file)!r} is damaged ({why}): its entries are encoded again")
        self._shards.pop(file, None)
        lost = {key for key, shard_file in self._shard_of.items() if shard_file == file}
        self._verified -= lost
        for key in lost:
            del self._shard_of[key]
        for other, shard in self._shards.items():
            for key in lost & shard.checksums.keys():
                self._shard_of.setdefault(key, other)
        try:
            file.unlink(missing_ok=True)
        except OSError:
            self._unremovable.add(file)  # another user's file; do not open it again


class _Shard:
    """An open shard. It stays readable when another process removes the file.

    Raises SafetensorError, ValueError, KeyError, TypeError or OSError if the file is damaged.
    """

    def __init__(self, file: Path) -> None:
        self.tensors = safe_open(file, framework="pt")
        about = json.loads((self.tensors.metadata() or {})["posttrain"])
        self.checksums: dict[str, int] = about["checksums"]
        self.dtypes: dict[str, str] = about["computed"]
        """Tensor name -> the dtype in which it was computed."""
        if set(self.tensors.keys()) != {f"{key}/{name}" for key in self.checksums for name in self.dtypes}:
            raise ValueError("its tensors are not those that it lists")

    def read(self, key: str) -> Entry:
        return {name: self.tensors.get_tensor(f"{key}/{name}") for name in self.dtypes}


def checksum(key: str, entry: Entry, dtypes: Mapping[str, str]) -> int:
    """The CRC-32 of an entry: its key, names, shapes, values, and dtypes as stored and as computed."""
    value = zlib.crc32(key.encode())
    for name, tensor in sorted(entry.items()):
        identity = f"{name} {tensor.dtype} {dtypes[name]} {tuple(tensor.shape)}"
        value = zlib.crc32(identity.encode(), value)
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


def rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tensor`` in ``dtype``, if that is the smaller one."""
    return tensor.to(dtype) if dtype is not None and dtype.itemsize < tensor.dtype.itemsize else tensor


def size_of(entry: Entry, dtype: torch.dtype | None) -> int:
    """Bytes that ``entry`` takes on disk, at most."""
    sizes = [
        t.dtype.itemsize if dtype is None else min(t.dtype.itemsize, dtype.itemsize) for t in entry.values()
    ]
    return HEADER_BYTES + sum(t.numel() * size for t, size in zip(entry.values(), sizes, strict=True))


def _as_computed(entry: Entry, dtypes: Mapping[str, str]) -> Entry:
    return {name: tensor.to(getattr(torch, dtypes[name])) for name, tensor in entry.items()}


def _remove_stale(folder: Path) -> None:
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()
