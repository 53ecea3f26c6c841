"""Reads the files of a checkpoint back as a training state, and checks them.

A checkpoint has ``state.json``, a safetensors file of each process that held numbers of its own, and the
manifest. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.engine.manifest import (
    MANIFEST,
    Damage,
    Manifest,
    check_files,
    check_keys,
    keys_of,
    kind_of,
    read_manifest,
)
from posttrain.engine.part_file import read_pieces
from posttrain.engine.state import StoredState
from posttrain.policy.piece import Piece, Stored

STATE = "state.json"
"""The file of all that is no tensor."""


class Values(BaseModel):
    """What ``state.json`` has; see :class:`posttrain.engine.state.State`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    step: int
    forward_equivalents: int
    extra: dict[str, Any]


def part_names(count: int) -> list[str]:
    """The names of the files with tensors, if ``count`` processes write one."""
    return [f"tensors-{i}-of-{count}.safetensors" for i in range(1, count + 1)]


def load(checkpoint: Path) -> StoredState:
    """The state in ``checkpoint``, memory-mapped, its files not compared with its manifest. Raises Damage."""
    return _loaded(checkpoint, read_manifest(checkpoint))


def verified(checkpoint: Path, *fingerprints: str) -> StoredState:
    """The state in ``checkpoint``, after every byte and key was compared with the manifest.

    Raises Damage where they differ, Foreign where the checkpoint is of none of ``fingerprints``.
    """
    return _loaded(checkpoint, check_files(checkpoint, *fingerprints))


def _loaded(checkpoint: Path, manifest: Manifest) -> StoredState:
    names = part_names(len(manifest.files) - 1)
    if manifest.files.keys() != {STATE, *names}:
        raise Damage(f"{MANIFEST} lists the files {sorted(manifest.files)}, not {sorted([STATE, *names])}")
    values = _values(checkpoint)
    if manifest.step != values.step:
        raise Damage(f"the state is of step {values.step}, and {MANIFEST} says {manifest.step}")
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for name in names:
        for path, piece in read_pieces(checkpoint / name).items():
            pieces[path].append(piece)
    state, kinds = StoredState(values.step, values.forward_equivalents, values.extra), {}
    for path, own in pieces.items():
        try:
            stored = Stored(own)
        except ValueError as error:
            raise Damage(f"{path} is not whole: {error}") from error
        state.add(path, stored)
        kinds[path] = kind_of(stored.dtype, stored.shape)
    check_keys(manifest, {**dict(keys_of(values.model_dump())), **kinds})
    return state


def _values(checkpoint: Path) -> Values:
    try:
        return Values.model_validate(json.loads((checkpoint / STATE).read_bytes()))
    except FileNotFoundError:
        raise Damage(f"{STATE} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise Damage(f"{STATE} is no training state: {where}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise Damage(f"{STATE} cannot be read: {error}") from error
