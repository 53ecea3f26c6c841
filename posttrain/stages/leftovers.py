"""Removes what a killed run left unfinished in its folder, when the run is taken up again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import DamagedError
from posttrain.evaluation.parts import CARD, LOCK, finished
from posttrain.support.files import clear, is_unfinished, locked

WHOLE = ("final", "exact", "images", "grid", "tensorboard", "failed_reward")
"""Folders that appear whole, or into which nothing is published: they are not searched."""


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files, empty checkpoints, and the parts of finished evaluations below ``folder``.

    Only the process that holds the run folder may call it, before the others write there.
    """
    for path in list(_unfinished(folder)):
        clear(path)
    for checkpoints in folder.glob("*/checkpoints"):
        for step in (*checkpoints.glob("step-*"), checkpoints):
            if step.is_dir() and not any(step.iterdir()):
                step.rmdir()
    for card in folder.glob(f"*/evaluation/{CARD}"):
        with locked(card.parent / LOCK), contextlib.suppress(DamagedError):  # it is mended later
            finished(card.parent)  # removes the parts


def _unfinished(folder: Path) -> Iterator[Path]:
    """What :func:`posttrain.support.files.aside` made and no process finished."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        yield from (here / name for name in (*folders, *files) if is_unfinished(name))
        if "final" in folders:  # its model card is written into it
            yield from (path for path in (here / "final").iterdir() if is_unfinished(path.name))
        folders[:] = [n for n in folders if n not in WHOLE and not is_unfinished(n)]
