"""Writes a Shapes data set to disk, as JPEG and JSONL in the published format."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.random import Generator, Philox

from posttrain.errors import DataError
from posttrain.shapes.render import render
from posttrain.shapes.scene import SIZE, STYLES, TASKS, Scene, sample_scene, sample_task
from posttrain.support.files import aside, publish

VERSION = 4
"""Increased when the same settings would render other images."""
EVALUATION = 0xE7A1
"""The key of the random stream of held-out prompts, so that it differs from those of the images."""


def scene_at(seed: int, index: int, style: str = "clean") -> Scene:
    """The ``index``-th scene of the data set with that seed and style. It depends on nothing else."""
    rng = Generator(Philox(key=[seed, index]))
    return sample_scene(rng, TASKS[index % len(TASKS)], STYLES[style])


def build(folder: Path, images: int, seed: int, style: str = "clean") -> None:
    """Render ``images`` scenes into ``folder``, which appears only when it is complete.

    Writes ``train.jsonl`` (md5, caption_en, bw, bh), ``images/{md5}.jpg``, ``metadata.jsonl`` (GenEval's
    format with the true prompt, one row for each image, in the same order) and ``shapes.json``. Does nothing
    if the folder holds this data set already. Raises DataError if it holds something else or cannot be
    written.
    """
    settings = {"images": images, "seed": seed, "style": style, "version": VERSION}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (existing := _settings(folder)) == settings:
            return
        content = f"another Shapes data set ({existing})" if existing else "something else"
        raise DataError(f"{str(folder)!r} holds {content}, not {settings}: give another folder or remove it")
    try:
        # two runs may write the same folder at once
        with aside(folder, shared=True) as unfinished:
            (unfinished / "images").mkdir(parents=True)
            with (
                (unfinished / "train.jsonl").open("w") as rows,
                (unfinished / "metadata.jsonl").open("w") as metadata,
            ):
                for index in range(images):
                    scene = scene_at(seed, index, style)
                    data = _jpeg(scene)
                    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
                    (unfinished / "images" / f"{md5}.jpg").write_bytes(data)
                    row = {"md5": md5, "caption_en": scene.caption, "bw": SIZE, "bh": SIZE}
                    rows.write(json.dumps(row) + "\n")
                    metadata.write(json.dumps(scene.metadata) + "\n")
            (unfinished / "shapes.json").write_text(json.dumps(settings))
            publish(unfinished, folder, replace=False)
    except OSError as error:
        if folder.is_dir() and _settings(folder) == settings:
            return  # another run wrote it first
        raise DataError(f"cannot write the Shapes data set {str(folder)!r}: {error}") from error


def evaluation_prompts(count: int, seed: int, tasks: Sequence[str] = TASKS) -> list[dict[str, Any]]:
    """``count`` metadata rows in GenEval's format, balanced over ``tasks``. A task repeats a prompt only
    after it has used all of its prompts."""
    rng = Generator(Philox(key=[seed, EVALUATION]))
    used: dict[str, set[str]] = {tag: set() for tag in tasks}
    rows = []
    for index in range(count):
        tag = tasks[index % len(tasks)]
        row = sample_task(rng, tag)
        for _ in range(200):
            if row["prompt"] not in used[tag]:
                break
            row = sample_task(rng, tag)
        else:
            used[tag].clear()  # all prompts of this task are used up
        used[tag].add(row["prompt"])
        rows.append(row)
    return rows


def _settings(folder: Path) -> Any:
    """The settings of the data set in ``folder``; None if there is none."""
    try:
        return json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError):
        return None


def _jpeg(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    render(scene).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
