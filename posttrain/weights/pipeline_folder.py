"""Finds the folder of a diffusers pipeline, and reads and writes its index and configurations."""

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
"""Names of the models that come with the package begin with this."""


def local_folder(path: str) -> Path | None:
    """The folder that ``path`` names on this machine, or None.

    ``path`` is the name of a shipped model, a folder, or a hub name; for a hub name this is the snapshot in
    the hub's cache.
    """
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
    """Say why ``path`` cannot be loaded as a pipeline of one of the classes ``pipelines``; None if it can.

    ``component`` is the folder of its denoiser. Loads no weights and uses no network, so a hub name that is
    not in the cache passes.
    """
    folder = local_folder(path)
    if folder is None:
        if path.startswith(SHIPPED):
            shipped = [SHIPPED + p.name for p in sorted(ASSETS.glob("*")) if p.is_dir()]
            return f"model.path: no model {path!r} comes with posttrain; there are {shipped}"
        if _looks_local(path):
            return f"model.path: the folder {str(Path(path).expanduser().absolute())!r} does not exist"
        return None
    if not (folder / "model_index.json").is_file():
        return f"model.path: {str(folder)!r} holds no model_index.json, so it is no diffusers pipeline folder"
    try:
        index = folder / "model_index.json"
        pipeline = json_object(index.read_bytes(), index).get("_class_name")
        for name in ("vae", component):
            config(path, name)
        header_shapes(folder / component)
    except ModelError as error:
        return f"model.path: {error}"
    if pipeline not in pipelines:
        return f"model.path: {str(folder)!r} is a {pipeline}, not a {' or '.join(pipelines)}"
    if not (folder / component).is_dir():
        return f"model.path: {str(folder)!r} has no folder {component!r}"
    return None


def index_of(path: str) -> dict[str, Any] | None:
    """A pipeline's ``model_index.json``, downloaded if ``path`` is a hub name; None if there is none."""
    folder = local_folder(path)
    if folder is None and not _looks_local(path) and not path.startswith(SHIPPED):
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(OSError, ValueError):
            folder = Path(hf_hub_download(path, "model_index.json")).parent
    if folder is None or not (file := folder / "model_index.json").is_file():
        return None
    return json_object(file.read_bytes(), file)


def config(path: str, component: str, name: str = "config.json") -> dict[str, Any] | None:
    """A component's ``config.json``, or its file ``name``; None if it is not on this machine."""
    folder = local_folder(path)
    if folder is None or not (file := folder / component / name).is_file():
        return None
    return json_object(file.read_bytes(), file)


def components(folder: Path) -> set[str]:
    """The names of the components in the index of a pipeline's ``folder``."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}


def link_components(origin: Path, folder: Path, names: Iterable[str]) -> None:
    """Put the components ``names`` of the pipeline at ``origin`` into ``folder`` unchanged.

    Their files become hard links if the file system allows it, else copies. So a stage takes no disk space
    for another copy of the text encoders.
    """
    for file in sorted(p for name in names for p in (origin / name).rglob("*") if p.is_file()):
        target = folder / file.relative_to(origin)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file.resolve(), target)
        except OSError:
            shutil.copyfile(file, target)


def write_index(origin: Path, folder: Path, used: Iterable[str]) -> None:
    """Copy ``model_index.json`` from ``origin``, with components outside ``used`` marked as absent."""
    index, present = json.loads((origin / "model_index.json").read_text()), set(used)
    for name, value in index.items():
        if isinstance(value, list) and name not in present:
            index[name] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _looks_local(path: str) -> bool:
    # the hub refuses such names, for example "models/", so a folder must be meant
    return not re.fullmatch(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", path, re.ASCII) or bool(
        re.search(r"--|\.\.|\.git$|.{97}", path)
    )
