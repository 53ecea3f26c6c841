"""Writes a checkpoint: every process its own part of the state, and the main one the rest."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from posttrain.engine.checkpoint import STATE, Values
from posttrain.engine.manifest import FORMAT, MANIFEST, File, Hashed, Manifest, keys_of, kind_of
from posttrain.engine.part_file import write_pieces
from posttrain.engine.state import State
from posttrain.errors import PosttrainError
from posttrain.support.files import beside, published
from posttrain.support.write_errors import writing

POLL_SECONDS = 0.05


class PartMissing(PosttrainError):
    """The part of another process did not come, and is not waited for any longer."""


@dataclass
class Writing:
    """One checkpoint that is being written.

    A process other than the main one says that its file is whole by a note beside it, with size and hash. The
    main process waits for the notes, writes the manifest and gives the folder its name. Processes exchange
    nothing but files, so all this may happen in a thread beside training.
    """

    target: Path
    """The checkpoint's folder."""
    mark: str
    """Part of the unfinished folder's name, which no other start of the run has."""
    files: dict[int, str]
    """Rank -> name of the file of that process, for those that hold numbers of their own."""
    fingerprint: str
    """Says of which run and stage the checkpoint is."""
    until: float = math.inf
    """When the main process no longer waits for others, by the monotonic clock."""

    def write_part(self, rank: int, state: State) -> None:
        """Write the file of a process that is not the main one. Raises PosttrainError."""
        folder = beside(self.target, self.mark)
        with writing(self.target, state.size):
            folder.mkdir(parents=True, exist_ok=True)
            described = write_pieces(folder / self.files[rank], state.held)
            note = _note(folder / self.files[rank])
            unfinished = beside(note, "")
            unfinished.write_text(described.model_dump_json(), "utf-8")
            unfinished.rename(note)  # nothing may follow: the main process gives the folder its name now

    def write_rest(self, state: State) -> None:
        """Write the main process's tensors and what is no tensor, wait for the others, publish the folder.

        Raises PosttrainError; then there is no folder.
        """
        values = Values(step=state.step, forward_equivalents=state.forward_equivalents, extra=state.extra)
        text = json.dumps(values.model_dump(), indent=1)
        kinds = {path: kind_of(p.values.dtype, p.shape) for path, p in state.tensors.items()}
        with published(self.target, state.size, self.mark) as folder:
            with (folder / STATE).open("wb") as file:
                hashed = Hashed(file)
                hashed.write(text.encode())
            files = {STATE: hashed.described()}
            for rank, name in self.files.items():
                file = folder / name
                files[name] = self._note_of(rank, file) if rank else write_pieces(file, state.held)
            manifest = Manifest(
                format=FORMAT,
                step=state.step,
                fingerprint=self.fingerprint,
                files=files,
                keys={**dict(keys_of(json.loads(text))), **kinds},
            )
            (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), "utf-8")

    def _note_of(self, rank: int, file: Path) -> File:
        """Size and hash of the ``file`` that another process writes, once it is whole."""
        note = _note(file)
        while not note.exists():
            if time.monotonic() > self.until:
                why = f"process {rank} did not write its part"
                raise PartMissing(f"cannot write {str(self.target)!r}: {why}")
            time.sleep(POLL_SECONDS)
        described = File.model_validate_json(note.read_bytes())
        note.unlink()
        return described


def _note(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def has_room(sizes: list[tuple[int, str, int | None]]) -> bool:
    """Whether a copy of each process's state leaves as much of the CPU's memory as it takes, everywhere.

    Of each process: the bytes of its state, its machine, and the bytes that are free there."""
    for machine in {name for _, name, _ in sizes}:
        size = sum(size for size, name, _ in sizes if name == machine)
        if any(free is not None and 2 * size > free for _, name, free in sizes if name == machine):
            return False
    return True
