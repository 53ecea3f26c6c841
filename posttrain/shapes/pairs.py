"""Writes preference pairs of Shapes: an image of what the prompt asks for, and one of something else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.random import Generator, Philox

from posttrain.shapes.dataset import VERSION, jpeg, kept, once, scene_at
from posttrain.shapes.scene import RELATIONS, SIZE, STYLES, TASKS, Metadata, Scene, Thing, sample_scene

FILES = {"images", "pairs.jsonl", "shapes.json"}
REJECTED = 0xBAD
"""The key of the random stream of rejected scenes, so that it differs from that of the chosen ones."""


def build_pairs(folder: Path, pairs: int, seed: int) -> None:
    """Render ``pairs`` pairs into ``folder``, which appears only when it is complete.

    Writes ``pairs.jsonl`` (prompt, chosen, rejected, bw, bh), ``images/`` and ``shapes.json``. Does nothing
    if the folder holds them already. Raises DataError and PosttrainError as
    :func:`posttrain.shapes.dataset.build`.
    """
    once(folder, {"pairs": pairs, "seed": seed, "version": VERSION}, FILES, _render)


def rejected_scene(seed: int, index: int) -> Scene:
    """A scene of the same kind of task as the ``index``-th one of ``seed``, which does not show what that
    one's prompt asks for: it has another colour, number, shape or position. It depends on nothing else."""
    wanted = scene_at(seed, index).metadata["include"]
    rng = Generator(Philox(key=[seed, index], counter=[0, 0, 0, REJECTED]))
    while True:
        scene = sample_scene(rng, TASKS[index % len(TASKS)], STYLES["clean"])
        if not shows(scene.things, wanted):
            return scene


def shows(things: Sequence[Thing], include: Sequence[Metadata]) -> bool:
    """Whether ``things`` are what the clauses ``include`` ask for. Counts must be exact.

    Of a position the side alone counts, so a doubtful scene shows it."""
    found = [[thing for thing in things if _fits(thing, clause)] for clause in include]
    if any(len(fitting) != clause["count"] for fitting, clause in zip(found, include, strict=True)):
        return False
    for fitting, clause in zip(found, include, strict=True):
        if "position" in clause:
            relation, other = clause["position"]
            (dx, dy), (a, b) = RELATIONS[relation], (fitting[0], found[other][0])
            if (a.x - b.x) * dx + (a.y - b.y) * dy <= 0:
                return False
    return True


def _fits(thing: Thing, clause: Metadata) -> bool:
    return thing.kind == clause["class"] and clause.get("color", thing.color) == thing.color


def _render(folder: Path, settings: Mapping[str, Any]) -> None:
    (folder / "images").mkdir()
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as rows:
        for index in range(settings["pairs"]):
            chosen, rejected = scene_at(settings["seed"], index), rejected_scene(settings["seed"], index)
            row = {"prompt": chosen.caption, "bw": SIZE, "bh": SIZE}
            for name, scene in (("chosen", chosen), ("rejected", rejected)):
                row[name] = f"{kept(folder / 'images', jpeg(scene))}.jpg"
            rows.write(json.dumps(row) + "\n")
