"""A store of named tensors in files that any number of processes may read and add to at once.

A store is a folder of *shards*: memory-mapped safetensors files that appear by a rename and never change. An
entry is a few tensors under a key. Its checksum is in the shard's metadata, and a process verifies it when it
first reads the entry. If two processes write one entry at once, the store has it twice.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from posttrain.cache.room import SHARD, Room, writing
from posttrain.cache.shard import Entry, Shard, checksum, fault
from posttrain.errors import ModelError
from posttrain.support.files import aside, clear_stale, publish
from posttrain.weights.fitting import not_finite

ABOUT = "about.json"
"""A readable record of what the entries depend on."""
SHARD_BYTES, SHARD_ENTRIES = 64 * 2**20, 1024
"""A shard is written at either limit. It is the most that a kill can lose, and the unit of removal."""
HELD_ENTRY, HELD_BYTES = 16 * 2**10, 256 * 2**20
"""Entries of at most so many bytes stay in memory once they are read, up to so many bytes in all. Reading one
from a shard takes longer than to train on it."""
HEADER_BYTES = 512
"""Upper bound of what an entry takes in its shard's header."""


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
        self._shards: dict[Path, Shard] = {}
        self._shard_of: dict[str, Path] = {}
        self._verified: set[str] = set()
        self._held: dict[str, Entry] = {}
        self._held_bytes = 0
        self._pending: dict[str, Entry] = {}
        self._pending_bytes = 0
        self._dtypes: dict[str, str] = {}
        self._unremovable: set[Path] = set()
        self._about = json.dumps(about, indent=2)
        with writing(self.folder):
            self._make_folder()
            clear_stale(self.folder)
        self.refresh()

    def refresh(self) -> None:
        """Open the shards that other processes have written since."""
        for file in sorted(self.folder.glob(SHARD)):
            if file in self._shards or file in self._unremovable:
                continue
            try:
                self._shards[file] = Shard(file)
            except FileNotFoundError:
                continue  # another process removed it
            except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
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
        if (held := self._held.get(key)) is not None:
            return held
        if key in self._pending:
            return _as_computed(self._pending[key], self._dtypes)
        if key not in self._shard_of:
            self.refresh()
        while (file := self._shard_of.get(key)) is not None:
            shard = self._shards[file]
            entry = shard.read(key)
            if key not in self._verified:
                if (why := fault(key, entry, shard)) is not None:
                    self._discard(file, why)
                    continue
                self._verified.add(key)
            return self._hold(key, _as_computed(entry, shard.dtypes))
        return None

    def _hold(self, key: str, entry: Entry) -> Entry:
        """``entry``, which is kept in memory if it is small."""
        size = sum(t.nbytes for t in entry.values())
        if size <= HELD_ENTRY and self._held_bytes + size <= HELD_BYTES:
            self._held[key] = {name: t.clone() for name, t in entry.items()}  # not a view of a shard's file
            self._held_bytes += size
        return entry

    def add(self, key: str, entry: Entry, name: str) -> None:
        """Add ``entry``, the encoding of what ``name`` says; :meth:`flush` writes it.

        All entries of a store have the same tensor names. Raises ModelError if a number is not finite, since
        every later run would read it.
        """
        rounded_entry = {n: rounded(t.detach(), self.dtype).cpu().contiguous() for n, t in entry.items()}
        if wrong := not_finite(rounded_entry):
            raise ModelError(
                f"the encoding of {name} is not finite ({', '.join(wrong)}): the encoder overflows in its "
                "precision or its weights are damaged; try model.dtype bf16 or fp32"
            )
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
            with aside(self.folder / ABOUT, secrets.token_hex(4)) as part:
                part.write_text(self._about, "utf-8")
                publish(part, self.folder / ABOUT)

    def _write(self, entries: Mapping[str, Entry]) -> None:
        checksums = {key: checksum(key, entry, self._dtypes) for key, entry in entries.items()}
        kept = {"store": self.folder.name, "checksums": checksums, "computed": self._dtypes}
        about = json.dumps(kept, sort_keys=True)
        name = hashlib.blake2b(about.encode(), digest_size=12).hexdigest()
        file = self.folder / f"{name}.safetensors"
        with writing(self.folder), aside(file, secrets.token_hex(4)) as part:
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
