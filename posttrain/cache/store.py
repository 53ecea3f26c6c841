"""How are named tensors kept in files that any number of processes read and add to at once?

A store is a folder of *shards*: memory-mapped safetensors files that appear by a rename and never change.
An entry is some tensors under a key; its checksum lies in its shard's metadata and is compared when this
process first reads it. Where two processes write the same entry at once, there are two equal ones.
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
"""What the store's entries were made by, for people."""
SHARD_BYTES, SHARD_ENTRIES = 64 * 2**20, 1024
"""A shard is written when one of these is reached: what a kill can lose, and what is removed at once."""
STALE_SECONDS = 3600
"""A part older than this was left by a killed process: a shard is written in seconds."""
HEADER_BYTES = 512
"""Of an entry in its shard's header, at most."""

Entry = dict[str, Tensor]


class Store:
    """The entries in the folder ``name`` of ``room``, float32 tensors rounded to ``dtype`` if one is given.

    ``about`` is kept beside them for people; ``tell`` is called with a line on each damaged file. Raises
    PosttrainError where the folder cannot be written.
    """

    def __init__(
        self,
        room: Room,
        name: str,
        about: Mapping[str, object],
        dtype: torch.dtype | None,
        tell: Callable[[str], None],
    ) -> None:
        self.room, self.folder, self.dtype, self.tell = room, room.root / name, dtype, tell
        self._shards: dict[Path, _Shard] = {}
        self._place: dict[str, Path] = {}
        self._verified: set[str] = set()
        self._pending: dict[str, Entry] = {}
        self._pending_bytes = 0
        self._computed: dict[str, str] = {}
        self._bad: set[Path] = set()
        self._about = json.dumps(about, indent=2)
        with writing(self.folder):
            self._make_folder()
            _remove_stale(self.folder)
        self.refresh()

    def refresh(self) -> None:
        """Learn of the shards that other processes have written."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file in self._shards or file in self._bad:
                continue
            try:
                self._shards[file] = _Shard(file)
            except FileNotFoundError:
                continue  # another process made room
            except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
                self._discard(file, str(error))
                continue
            for key in self._shards[file].checksums:
                self._place.setdefault(key, file)

    def __contains__(self, key: str) -> bool:
        return key in self._place or key in self._pending

    def use(self, keys: Iterable[str]) -> None:
        """Mark the shards that hold ``keys`` as used now, and keep this process from removing them."""
        for file in {self._place[key] for key in keys if key in self._place}:
            self.room.use(file)

    def read(self, key: str) -> Entry | None:
        """The tensors of ``key`` in the dtypes they were computed in, on the CPU; None where there are none,
        or only damaged ones, which are told of and removed."""
        if key in self._pending:
            return _as_computed(self._pending[key], self._computed)
        if key not in self._place:
            self.refresh()
        while (file := self._place.get(key)) is not None:
            shard = self._shards[file]
            kept = shard.read(key)
            if key in self._verified or checksum(key, kept, shard.computed) == shard.checksums[key]:
                self._verified.add(key)
                return _as_computed(kept, shard.computed)
            self._discard(file, "its content does not have the checksum that was written with it")
        return None

    def add(self, key: str, entry: Entry) -> None:
        """Keep ``entry``, whose names are those of every entry; it is on the disk after :meth:`flush`."""
        kept = {name: rounded(t.detach(), self.dtype).cpu().contiguous() for name, t in entry.items()}
        self._computed = {name: str(t.dtype).removeprefix("torch.") for name, t in entry.items()}
        self._pending[key] = kept
        self._pending_bytes += size_of(entry, self.dtype)
        if self._pending_bytes >= SHARD_BYTES or len(self._pending) >= SHARD_ENTRIES:
            self.flush()

    def flush(self) -> None:
        """Write what was added, but for what another process wrote meanwhile."""
        if not self._pending:
            return
        self.refresh()
        if new := {key: entry for key, entry in self._pending.items() if key not in self._place}:
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
        checksums = {key: checksum(key, entry, self._computed) for key, entry in entries.items()}
        about = json.dumps({"checksums": checksums, "computed": self._computed}, sort_keys=True)
        name = hashlib.blake2b(about.encode(), digest_size=12).hexdigest()
        file = self.folder / f"{name}.safetensors"
        with writing(self.folder), aside(file, shared=True) as part:
            self._make_folder()  # again: the cache may be cleared while a run uses it
            # a tensor that is a row of a batch would be refused for sharing its memory with the others
            tensors = {f"{key}/{n}": t.clone() for key, entry in entries.items() for n, t in entry.items()}
            save_file(tensors, part, metadata={"posttrain": about})
            # safetensors lets nobody else read what it writes; the user's own mask is to decide
            part.chmod((self.folder / ABOUT).stat().st_mode & 0o777)
            self.room.publish(part, file)

    def _discard(self, file: Path, why: str) -> None:
        """Forget a damaged shard and remove it: its entries are missing then, and made anew."""
        self.tell(f"the cache file {str(file)!r} is damaged ({why}): its entries are encoded again")
        self._shards.pop(file, None)
        lost = {key for key, place in self._place.items() if place == file}
        self._verified -= lost
        for key in lost:
            del self._place[key]
        for other, shard in self._shards.items():
            for key in lost & shard.checksums.keys():
                self._place.setdefault(key, other)
        try:
            file.unlink(missing_ok=True)
        except OSError:
            self._bad.add(file)  # another user's: not to be opened again


class _Shard:
    """An opened file, which stays readable when a process removes it. Raises what safetensors and json do."""

    def __init__(self, file: Path) -> None:
        self.tensors = safe_open(file, framework="pt")
        about = json.loads((self.tensors.metadata() or {})["posttrain"])
        self.checksums: dict[str, int] = about["checksums"]
        self.computed: dict[str, str] = about["computed"]
        """Name -> the dtype in which the tensors of that name were computed."""
        if set(self.tensors.keys()) != {f"{key}/{name}" for key in self.checksums for name in self.computed}:
            raise ValueError("its tensors are not those that it lists")

    def read(self, key: str) -> Entry:
        return {name: self.tensors.get_tensor(f"{key}/{name}") for name in self.computed}


def checksum(key: str, entry: Entry, computed: Mapping[str, str]) -> int:
    """The CRC-32 over everything that is read of an entry: key, names, dtypes, shapes and values."""
    value = zlib.crc32(key.encode())
    for name, tensor in sorted(entry.items()):
        described = f"{name} {tensor.dtype} {computed[name]} {tuple(tensor.shape)}"
        value = zlib.crc32(described.encode(), value)
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


def rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tensor`` as it is kept: in ``dtype`` where that is smaller than what was computed."""
    return tensor.to(dtype) if dtype is not None and dtype.itemsize < tensor.dtype.itemsize else tensor


def size_of(entry: Entry, dtype: torch.dtype | None) -> int:
    """Bytes that ``entry`` takes on the disk, at most."""
    sizes = [
        t.dtype.itemsize if dtype is None else min(t.dtype.itemsize, dtype.itemsize) for t in entry.values()
    ]
    return HEADER_BYTES + sum(t.numel() * size for t, size in zip(entry.values(), sizes, strict=True))


def _as_computed(kept: Entry, computed: Mapping[str, str]) -> Entry:
    return {name: tensor.to(getattr(torch, computed[name])) for name, tensor in kept.items()}


def _remove_stale(folder: Path) -> None:
    for part in folder.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()
