"""Finds the folder of a diffusers pipeline, and reads and writes its index and configurations."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.support.paths import expanded, is_file, is_folder
from posttrain.weights.files import component_weights, headers, json_object
from posttrain.weights.needed_files import lacking, listed
from posttrain.weights.run_folders import weights_folder

ASSETS = Path(str(files("posttrain"))) / "assets"
INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".onnx", ".ckpt", ".pt", ".pth", ".gguf")
"""Endings of files of weights, in all formats in which models are published."""
SHIPPED = "posttrain/"
"""Names of the models that come with the package begin with this."""


def local_folder(path: str, revision: str | None = None) -> Path | None:
    """The folder that ``path`` names on this machine, or None.

    ``path`` is the name of a shipped model, a folder, or a hub name; for a hub name this is the snapshot of
    ``revision``, by default of ``main``, in the hub's cache. The folder of a stage, or of a run, stands for
    the weights that it published.
    """
    if path.startswith(SHIPPED):
        folder = ASSETS / path.removeprefix(SHIPPED)
        return folder if is_folder(folder) else None
    if is_folder(folder := expanded(path)):
        return weights_folder(folder.resolve())
    if _looks_local(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(path, INDEX, revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def missing(
    path: str,
    component: str,
    pipelines: Sequence[str],
    left_out: Collection[str] = (),
    revision: str | None = None,
) -> str | None:
    """Say why ``path`` cannot be loaded as a pipeline of one of the classes ``pipelines``; None if it can.

    ``component`` is the folder of its denoiser; those in ``left_out`` are not loaded. Loads no weights and
    uses no network, so a hub name that is not, or not wholly, in the cache passes.
    """
    folder = local_folder(path, revision)
    if folder is None:
        if path.startswith(SHIPPED):
            shipped = [SHIPPED + p.name for p in sorted(ASSETS.glob("*")) if p.is_dir()]
            return f"no model {path!r} comes with posttrain; there are {shipped}"
        if is_file(expanded(path)):
            return f"{path!r} is a file; a folder in diffusers' format is expected"
        if _looks_local(path):
            return f"the folder {str(expanded(path).absolute())!r} does not exist"
        return None
    if not (folder / INDEX).is_file():
        return f"{str(folder)!r} holds no {INDEX}, so it is no diffusers pipeline folder"
    try:
        index = index_in(folder)
        if not isinstance(pipeline := index.get("_class_name"), str):
            found = "it has no _class_name" if pipeline is None else f"its _class_name is {pipeline!r}"
            return f"{str(folder / INDEX)!r} names no class of pipelines: {found}"
        if pipeline not in pipelines:
            return f"{str(folder)!r} is a {pipeline}, not a {' or '.join(pipelines)}"
        headers(folder / component)
        if component not in listed(index):
            return f"{str(folder / INDEX)!r} names no {component}"
        if not from_hub(path) and (lost := lacking(folder, index, left_out)) is not None:
            return lost
    except ModelError as error:
        return str(error)
    return None


def from_hub(path: str) -> bool:
    """Whether ``path`` is a hub name and no folder, so that what is missing here can be downloaded."""
    return not (path.startswith(SHIPPED) or Path(path).expanduser().is_dir() or _looks_local(path))


def useless_revision(path: str, revision: str | None) -> dict[str, str]:
    """The field ``revision`` -> why it does nothing; empty if ``path`` is a hub name, or if it is None."""
    if revision is None or from_hub(path):
        return {}
    return {"revision": f"has no effect: only a hub repository has revisions, {path!r} is none; remove it"}


def complete_folder(path: str, left_out: Collection[str] = (), revision: str | None = None) -> Path | None:
    """As :func:`local_folder`, but None if ``path`` is a hub name of which some file is not in the cache."""
    folder = local_folder(path, revision)
    if folder is None or not from_hub(path):
        return folder
    try:
        return None if lacking(folder, index_in(folder), left_out) else folder
    except ModelError:
        return None


def index_in(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline's ``folder``. Raises ModelError if it cannot be read."""
    try:
        return json_object((folder / INDEX).read_bytes(), folder / INDEX)
    except OSError as error:
        raise ModelError(f"{str(folder / INDEX)!r} cannot be read: {error}") from error


def index_of(path: str) -> dict[str, Any] | None:
    """A pipeline's ``model_index.json``, downloaded if ``path`` is a hub name; None if there is none."""
    folder = local_folder(path)
    if folder is None and not _looks_local(path) and not path.startswith(SHIPPED):
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(OSError, ValueError):
            folder = Path(hf_hub_download(path, INDEX)).parent
    return None if folder is None or not (folder / INDEX).is_file() else index_in(folder)


def config(
    path: str, component: str, name: str = "config.json", revision: str | None = None
) -> dict[str, Any] | None:
    """A component's ``config.json``, or its file ``name``; None if it is not on this machine."""
    folder = local_folder(path, revision)
    if folder is None or not (file := folder / component / name).is_file():
        return None
    return json_object(file.read_bytes(), file)


def components(folder: Path) -> set[str]:
    """The names of the components in the index of a pipeline's ``folder``. Raises ModelError."""
    return set(listed(index_in(folder)))


def component_files(origin: Path, names: Iterable[str]) -> dict[str, Path]:
    """Name below ``origin`` -> file, of the components ``names`` of the pipeline there.

    Hidden files and weights that are not read, of another precision or format, do not count.
    """
    return {f"{name}/{file.name}": file for name in sorted(names) for file in _read_files(origin / name)}


def _read_files(folder: Path) -> list[Path]:
    """The files of a component's ``folder`` from which it is loaded."""
    read = component_weights(folder)
    others = (file for file in folder.glob("*") if file.is_file() and not file.name.startswith("."))
    return sorted({*read, *(file for file in others if file.suffix not in WEIGHTS)})


def files_of(path: str, left_out: Collection[str] = (), revision: str | None = None) -> dict[str, Path]:
    """Name -> file of all components of the pipeline ``path`` but those ``left_out``; empty if it is not
    here."""
    if (folder := complete_folder(path, left_out, revision)) is None or not (folder / INDEX).is_file():
        return {}
    return component_files(folder, components(folder) - {*left_out})


def write_index(origin: Path, folder: Path, used: Iterable[str]) -> None:
    """Copy ``model_index.json`` from ``origin``, with components outside ``used`` marked as absent."""
    index, present = index_in(origin), set(used)
    for name, value in index.items():
        if isinstance(value, list) and name not in present:
            index[name] = [None, None]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _looks_local(path: str) -> bool:
    if is_file(expanded(path)):
        return True
    # the hub refuses such names, for example "models/", so a folder must be meant
    return not re.fullmatch(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", path, re.ASCII) or bool(
        re.search(r"--|\.\.|\.git$|.{97}", path)
    )
