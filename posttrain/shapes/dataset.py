"""Writes a Shapes data set to disk, as JPEG and JSONL in the published format."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from numpy.random import Generator, Philox

from posttrain.errors import DataError
from posttrain.shapes.render import render
from posttrain.shapes.scene import SIZE, STYLES, TASKS, Scene, sample_scene, sample_task
from posttrain.support.files import locked, published
from posttrain.support.paths import in_the_way

FILES = {"images", "train.jsonl", "metadata.jsonl", "shapes.json"}
VERSION = 5
"""Increased when the same settings would render other images."""
MANY, CHUNK = 8000, 250
"""Images from which on several processes render them; and how many one renders at a time."""
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
    if the folder holds this data set already, also if another process renders it meanwhile. Raises DataError
    if it holds something else, and PosttrainError if it cannot be written.
    """
    once(folder, {"images": images, "seed": seed, "style": style, "version": VERSION}, FILES, _render)


def once(
    folder: Path,
    settings: Mapping[str, Any],
    files: Set[str],
    render: Callable[[Path, Mapping[str, Any]], None],
) -> None:
    """Let ``render`` write the data set of those ``settings``, its ``files``, unless ``folder`` holds it.

    Raises as :func:`build` does.
    """
    if (problem := in_the_way(folder)) is not None:
        raise DataError(problem)
    if _holds(folder, settings, files):
        return
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            try:
                if not _holds(folder, settings, files):  # another process may have rendered it meanwhile
                    with published(folder) as unfinished:
                        render(unfinished, settings)
                        (unfinished / "shapes.json").write_text(json.dumps(settings), "utf-8")
            finally:
                with contextlib.suppress(OSError):  # whoever waits for the lock looks at the folder again
                    lock.unlink()
    except OSError as error:
        raise DataError(f"cannot write the Shapes data set {str(folder)!r}: {error}") from error


def _holds(folder: Path, settings: Mapping[str, Any], files: Set[str]) -> bool:
    """Whether ``folder`` holds the data set. One whose ``shapes.json`` is damaged is to be rendered again.

    Raises DataError if it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if (existing := _settings(folder)) == settings:
        return True
    if existing is None and folder.is_dir() and {p.name for p in folder.iterdir()} == files:
        return False
    content = f"another Shapes data set ({existing})" if existing else "something else"
    raise DataError(f"{str(folder)!r} holds {content}, not {settings}: give another folder or remove it")


def _render(folder: Path, settings: Mapping[str, Any]) -> None:
    """Render the scenes that ``settings`` describe into ``folder``."""
    (folder / "images").mkdir()
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as rows,
        (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata,
    ):
        for data, scene in _rendered(settings["images"], settings["seed"], settings["style"]):
            row = {"md5": kept(folder / "images", data), "caption_en": scene.caption, "bw": SIZE, "bh": SIZE}
            rows.write(json.dumps(row) + "\n")
            metadata.write(json.dumps(scene.metadata) + "\n")


def _rendered(images: int, seed: int, style: str) -> Iterator[tuple[bytes, Scene]]:
    """The JPEG and the scene of each image in order. Many images are rendered by as many processes as there
    are cores."""
    make = functools.partial(_image_at, seed, style)
    if images < MANY:
        yield from map(make, range(images))
        return
    with ProcessPoolExecutor() as pool:
        yield from pool.map(make, range(images), chunksize=CHUNK)


def _image_at(seed: int, style: str, index: int) -> tuple[bytes, Scene]:
    """The JPEG and the scene of image ``index``."""
    scene = scene_at(seed, index, style)
    return jpeg(scene), scene


def kept(folder: Path, data: bytes) -> str:
    """Write the JPEG ``data`` to ``folder``; returns its MD5, which is its name there."""
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    (folder / f"{md5}.jpg").write_bytes(data)
    return md5


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
        return json.loads((folder / "shapes.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def jpeg(scene: Scene) -> bytes:
    """The scene's image as a JPEG."""
    buffer = io.BytesIO()
    render(scene).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
