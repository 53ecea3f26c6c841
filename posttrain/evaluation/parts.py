"""Keeps the folder of an evaluation, which several processes may fill and a later call may finish.

``claim.json`` describes the evaluation that is being measured into the folder. Each batch is published as a
folder below ``parts``. The last process to finish merges the parts and writes the result card ``eval.json``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.evaluation.card import differing
from posttrain.support.files import locked, write

CARD, RECORDS, CLAIM, PARTS, COST = "eval.json", "records.jsonl", "claim.json", "parts", "cost.json"
LOCK = ".lock"
"""A process holds this lock while it reads or changes the state of the folder."""


def claim(folder: Path, draft: Mapping[str, Any]) -> dict[str, Any] | None:
    """Claim ``folder`` for the evaluation that ``draft``, its card without results, describes.

    Returns the result card if the folder holds this evaluation, finished. Raises PosttrainError if it holds
    another evaluation or other files. The caller holds the lock.
    """
    for file in (folder / CARD, folder / CLAIM):
        if not file.is_file():
            continue
        if differences := differing(json.loads(file.read_text()), draft):
            raise PosttrainError(
                f"{str(folder)!r} holds another evaluation; it differs in: {'; '.join(differences)}. "
                "Give another folder, or remove this one"
            )
        return finished(folder)
    if others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
        if "summary.json" in others:
            content = "an evaluation of an earlier version; remove it to evaluate anew"
        else:
            content = f"something else than an evaluation ({', '.join(others[:3])}); give another folder"
        raise PosttrainError(f"{str(folder)!r} holds {content}")
    write(folder / CLAIM, json.dumps(draft, indent=2))
    return None


def finished(folder: Path) -> dict[str, Any] | None:
    """The result card, or None if it is not written yet. The caller holds the lock.

    Removes the parts, which a process killed right after it wrote the card leaves behind.
    """
    if not (folder / CARD).is_file():
        return None
    _remove_parts(folder)
    return json.loads((folder / CARD).read_text())


@contextlib.contextmanager
def taken(folder: Path, batch: int) -> Iterator[bool]:
    """Reserve ``batch`` for this process within the block.

    Yields False if the batch is measured already, or another process is measuring it.
    """
    with contextlib.ExitStack() as held:
        with locked(folder / LOCK):
            free = not (folder / CARD).is_file()
            if free:
                file = folder / PARTS / f".{batch:06d}.lock"
                free = held.enter_context(locked(file, wait=False)) and not part(folder, batch).is_dir()
        yield free


def part(folder: Path, batch: int) -> Path:
    """The folder of one batch's records, images and cost."""
    return folder / PARTS / f"{batch:06d}"


def merge_parts(folder: Path, batches: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Collect the records and images of all parts; return the records, and the sum of each cost.

    Overwrites what an earlier call left that was killed while it merged. The caller holds the lock.
    """
    records: list[dict[str, Any]] = []
    total: dict[str, float] = {"forward_equivalents": 0, "seconds": 0}
    for batch in range(batches):
        source = part(folder, batch)
        records += [json.loads(line) for line in (source / RECORDS).read_text().splitlines()]
        cost = json.loads((source / COST).read_text())
        total = {name: value + cost[name] for name, value in total.items()}
        for file in (*source.glob("grid/*"), *source.glob("images/*")):
            _link(file, folder / file.relative_to(source))
    write(folder / RECORDS, "".join(json.dumps(record) + "\n" for record in records))
    return records, total


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write the result card, which makes the evaluation finished, and remove the parts."""
    write(folder / CARD, json.dumps(card, indent=2))
    _remove_parts(folder)


def _link(file: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(file)
    except OSError:  # the file system has no links
        shutil.copyfile(file, target)


def _remove_parts(folder: Path) -> None:
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / CLAIM).unlink(missing_ok=True)
