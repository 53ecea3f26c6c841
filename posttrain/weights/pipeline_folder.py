"""Reads and writes the folders of diffusers pipelines: where one lies, its index, its configurations."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.weights.files import header_shapes, json_object

ASSETS = Path(str(files("posttrain"))) / "assets"
SHIPPED = "posttrain/"
"""The prefix of the names of models that come with the package."""


def local_folder(path: str) -> Path | None:
    """The folder that ``path`` names on this machine (a hub name's cached snapshot included), if any."""
    if path.startswith(SHIPPED):
        folder = ASSETS / path.removeprefix(SHIPPED)
        return folder if folder.is_dir() else None
    if (folder := Path(path).expanduser()).is_dir():
        return folder.resolve()
    if _looks_local(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(path, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


def missing(path: str, component: str, pipelines: Sequence[str]) -> str | None:
    """Why ``path`` cannot be loaded as one of ``pipelines``, whose ``component`` is the denoiser; None where
    nothing is wrong. Nothing is loaded and no network is used."""
    folder = local_folder(path)
    if folder is None:
        if path.startswith(SHIPPED):
            have = sorted(p.name for p in ASSETS.glob("*") if p.is_dir())
            return (
                f"model.path: no model {path!r} comes with posttrain; there are {[SHIPPED + n for n in have]}"
            )
        if _looks_local(path):
            return f"model.path: the folder {str(Path(path).expanduser().absolute())!r} does not exist"
        return None
    if not (folder / "model_index.json").is_file():
        return f"model.path: {str(folder)!r} holds no model_index.json, so it is no diffusers pipeline folder"
    try:
        index = folder / "model_index.json"
        kind = json_object(index.read_bytes(), index).get("_class_name")
        for part in ("vae", component):
            config(path, part)
        header_shapes(folder / component)
    except ModelError as error:
        return f"model.path: {error}"
    if kind not in pipelines:
        return f"model.path: {str(folder)!r} is a {kind}, not a {' or '.join(pipelines)}"
    if not (folder / component).is_dir():
        return f"model.path: {str(folder)!r} has no folder {component!r}"
    return None


def index_of(path: str) -> dict[str, Any] | None:
    """A pipeline's ``model_index.json``, fetched where ``path`` is a hub name; None where there is none."""
    folder = local_folder(path)
    if folder is None and not _looks_local(path) and not path.startswith(SHIPPED):
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(OSError, ValueError):
            folder = Path(hf_hub_download(path, "model_index.json")).parent
    if folder is None or not (file := folder / "model_index.json").is_file():
        return None
    return json_object(file.read_bytes(), file)


def config(path: str, component: str, name: str = "config.json") -> dict[str, Any] | None:
    """A component's ``config.json``, where it is on this machine."""
    folder = local_folder(path)
    if folder is None or not (file := folder / component / name).is_file():
        return None
    return json_object(file.read_bytes(), file)


def components(folder: Path) -> set[str]:
    """The components that a pipeline folder's index says it has."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}


def link_components(origin: Path, folder: Path, names: Iterable[str]) -> None:
    """Put the components ``names`` of the pipeline at ``origin`` into ``folder`` as they are.

    They are hard links where the file system allows it, so a stage does not cost the disk another copy of
    the text encoders.
    """
    for file in sorted(p for name in names for p in (origin / name).rglob("*") if p.is_file()):
        target = folder / file.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError:
            shutil.copyfile(file, target)


def write_index(origin: Path, folder: Path, used: Iterable[str]) -> None:
    """Write ``model_index.json`` as at ``origin``, with the components that are not ``used`` marked so."""
    index, kept = json.loads((origin / "model_index.json").read_text()), set(used)
    for name, value in index.items():
        if isinstance(value, list) and name not in kept:
            index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _looks_local(path: str) -> bool:
    # a name that the hub would refuse, such as "models/", is a folder that is not there
    return not re.fullmatch(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", path, re.ASCII) or bool(
        re.search(r"--|\.\.|\.git$|.{97}", path)
    )
