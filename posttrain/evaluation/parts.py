"""Keeps the folder of an evaluation, which several processes may fill and a later call may finish.

``claim.json`` describes the evaluation that is being measured into the folder. Each batch is published as a
folder below ``parts``. The last process to finish merges the parts and writes the result card ``eval.json``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import DamagedError, PosttrainError
from posttrain.evaluation.card import differing
from posttrain.support.files import clear_up, locked, remove, write
from posttrain.support.records import read_object, read_rows
from posttrain.support.wording import counted
from posttrain.support.write_errors import writing
from posttrain.weights.run_folders import is_run

CARD, RECORDS, CLAIM, PARTS, COST = "eval.json", "records.jsonl", "claim.json", "parts", "cost.json"
OWN = (CLAIM, PARTS)
"""What the folder of an evaluation holds before its first batch is measured."""
SHOWN = ("scores", "tags", "tag_means")
"""What a finished card has for tables to show."""
ROW = ("prompt", "index", "scores")
"""What each row of the records has for tables to show."""
WORKER = "worker"
"""How the names of the locks begin that processes hold while they measure."""
LOCK = ".lock"
"""A process holds this lock while it reads or changes the state of the folder."""


class Occupied(PosttrainError):
    """A folder holds something else than the evaluation that is to be written there."""


def claim(folder: Path, draft: Mapping[str, Any], tell: Callable[[str], None]) -> dict[str, Any] | None:
    """Claim ``folder`` for the evaluation that ``draft``, its card without results, describes.

    Returns the result card if the folder holds this evaluation, finished. Another one that ended before its
    first batch was measured is replaced, and ``tell`` gets a line. Raises Occupied if the folder holds
    another evaluation, a damaged one, or other files. The caller holds the lock.
    """
    clear_up(folder)
    for file in (folder / CARD, folder / CLAIM):
        if not file.is_file():
            continue
        try:
            before = read_object(file)
        except DamagedError as error:
            raise Occupied(f"{error}. Give another folder, or remove this one") from error
        if not (differences := differing(before, draft)):
            return finished(folder)
        if file.name == CARD or _is_begun(folder):
            raise Occupied(
                f"{str(folder)!r} holds another evaluation; it differs in: {'; '.join(differences)}. "
                "Give another folder, or remove this one"
            )
        tell(f"{folder}: replaces an evaluation that ended before its first batch; {differences[0]}")
    if others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in OWN):
        if "summary.json" in others:
            content = "an evaluation of an earlier version; remove it to evaluate anew"
        else:
            content = f"something else than an evaluation ({', '.join(others[:3])}); give another folder"
        raise Occupied(f"{str(folder)!r} holds {content}")
    write(folder / CLAIM, json.dumps(draft, indent=2))
    return None


def put_aside(folder: Path) -> Path | None:
    """Rename ``folder`` to the first free name of ``folder-1``, ``folder-2`` and so on; returns the new path.

    An evaluation that is not finished is removed instead. Returns None then, and where there is no folder.
    """
    if not folder.is_dir():
        return None
    if (folder / CLAIM).exists() and not (folder / CARD).exists():
        remove(folder)
        return None
    numbers = itertools.count(1)
    target = next(path for n in numbers if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
    with writing(target):
        folder.rename(target)
    return target


def finished(folder: Path) -> dict[str, Any] | None:
    """The result card, or None if it is not written yet. The caller holds the lock.

    Removes the parts, which a process killed right after it wrote the card leaves behind.
    """
    if not (folder / CARD).is_file():
        return None
    _remove_parts(folder)
    return read_object(folder / CARD, *SHOWN)


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Let other processes know within the block that this one measures the evaluation in ``folder``.

    The caller holds the lock when the block begins. The sign ends with the process, however it ends.
    """
    (folder / PARTS).mkdir(exist_ok=True)
    with locked(folder / PARTS / f".{WORKER}-{platform.node()}-{os.getpid()}.lock"):
        yield


def _is_begun(folder: Path) -> bool:
    """Whether a batch of the evaluation in ``folder`` is measured, or a process is measuring it."""
    if any(path.is_dir() for path in (folder / PARTS).glob("*")):
        return True
    for file in (folder / PARTS).glob(f".{WORKER}-*.lock"):
        with locked(file, wait=False) as free:
            if not free:
                return True
    return False


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


def read_records(folder: Path, count: int | None) -> list[dict[str, Any]]:
    """The records in ``folder``, of which there must be ``count``, if it is known. Raises DamagedError."""
    rows = read_rows(folder / RECORDS, *ROW)
    if count not in (None, len(rows)):
        file = str(folder / RECORDS)
        raise DamagedError(f"{file!r} is damaged: it has {counted(len(rows), 'row')}, not {count}")
    return rows


def read_evaluation(folder: Path, *fields: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The result card and the records of the evaluation in ``folder``; both empty if none is finished.

    Each score of the card must have ``fields``, which are numbers. Raises DamagedError where a file of a
    finished evaluation is damaged or missing; it says what makes it again.
    """
    begun = (folder / CLAIM).exists()  # asked first, because it is removed after the card is written
    try:
        if not (folder / CARD).is_file():
            if not begun and (folder / RECORDS).is_file():
                raise DamagedError(f"{str(folder / CARD)!r} is missing, but {RECORDS} is there")
            return {}, []
        card = _read_card(folder, fields)
        return card, read_records(folder, card.get("images"))
    except DamagedError as error:
        again = "remove the folder and evaluate, to measure"
        if is_run(folder.parent.parent):
            again = "'posttrain run' with its recipe measures"
        raise DamagedError(f"{error}; {again} it again") from error


def read_what_is_whole(folder: Path, *fields: str) -> tuple[dict[str, Any], list[dict[str, Any]], str | None]:
    """As :func:`read_evaluation`, but what is damaged or missing is empty, and the last value tells it."""
    try:
        return *read_evaluation(folder, *fields), None
    except DamagedError as error:
        card: dict[str, Any] = {}
        with contextlib.suppress(DamagedError):
            card = _read_card(folder, fields)
        return card, [], str(error)


def _read_card(folder: Path, fields: Sequence[str]) -> dict[str, Any]:
    card = read_object(folder / CARD, "scores")
    for name, score in card["scores"].items() if isinstance(card["scores"], dict) else [("scores", None)]:
        if not isinstance(score, dict) or not all(isinstance(score.get(f), int | float) for f in fields):
            raise DamagedError(f"{str(folder / CARD)!r} is damaged: {name!r} is not what was written")
    return card


def merge_parts(folder: Path, sizes: Sequence[int]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Collect the records and images of all parts; return the records, and the sum of each cost.

    ``sizes`` are the numbers of samples of the batches. Overwrites what an earlier call left that was killed
    while it merged. The caller holds the lock. Raises PosttrainError for a damaged part, which is removed.
    """
    records: list[dict[str, Any]] = []
    total: dict[str, float] = {"forward_equivalents": 0, "seconds": 0}
    for batch, size in enumerate(sizes):
        source = part(folder, batch)
        try:
            records += read_records(source, size)
            cost = read_object(source / COST, *total)
        except DamagedError as error:
            remove(source)
            raise PosttrainError(
                f"{error}; it was removed, and the same command measures it again"
            ) from error
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
        write(target, file.read_bytes())


def _remove_parts(folder: Path) -> None:
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / CLAIM).unlink(missing_ok=True)
