"""Where do a pipeline's weights lie, and how are its components read, linked and written?"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError
from posttrain.fitting import misfit

if TYPE_CHECKING:
    import torch

SD3_PIPELINES = ("StableDiffusion3Pipeline",)
ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = "posttrain/"
"""Names that begin so are models that come with the package."""


def locate(path: str) -> str:
    """A local folder as an absolute path, or the hub name unchanged. Raises ModelError for a local
    folder or shipped model that is not there."""
    if reason := missing(path, "transformer", SD3_PIPELINES):
        raise ModelError(reason)
    if (folder := local_folder(path)) is not None:
        return str(folder)
    return path


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
    """What is wrong with ``path``, to be one of ``pipelines``, as far as can be seen without loading or
    network; None if nothing is."""
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
        kind = _json((folder / "model_index.json").read_bytes(), folder / "model_index.json").get(
            "_class_name"
        )
        for part in ("vae", component):
            config(path, part)
        header_shapes(path, component)
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
    return _json(file.read_bytes(), file)


def config(path: str, component: str, name: str = "config.json") -> dict[str, Any] | None:
    """A component's ``config.json``, where it is on this machine."""
    folder = local_folder(path)
    if folder is None or not (file := folder / component / name).is_file():
        return None
    return _json(file.read_bytes(), file)


def components(folder: Path) -> set[str]:
    """The components that a pipeline folder's index says it has."""
    index = json.loads((folder / "model_index.json").read_text())
    return {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}


def header_shapes(path: str, component: str) -> dict[str, tuple[int, ...]] | None:
    """Name -> shape of a component's weights, from the headers of its safetensors files alone."""
    folder = local_folder(path)
    files = sorted((folder / component).glob("*.safetensors")) if folder else []
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= file.stat().st_size - 8:
                pointer = " (it is a git-lfs pointer: run `git lfs pull`)" if start == b"version " else ""
                raise ModelError(f"{str(file)!r} is no safetensors file, or only a part of one{pointer}")
            header = _json(stream.read(length), file)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes or None


def _json(content: bytes, file: Path) -> dict[str, Any]:
    try:
        read = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(read, dict):
        raise ModelError(f"{str(file)!r} cannot be read: it is no JSON object")
    return read


def content_hash(folder: Path, names: Iterable[str]) -> str:
    """The sha256 over the names and contents of all files of the components ``names`` of a pipeline."""
    digest = hashlib.sha256()
    for name in sorted(names):
        for file in sorted(p for p in (folder / name).rglob("*") if p.is_file()):
            status = file.stat()
            inside = _file_hash(file, status.st_size, status.st_mtime_ns)
            digest.update(f"{file.relative_to(folder).as_posix()} {inside}\n".encode())
    return digest.hexdigest()


@functools.cache
def _file_hash(file: Path, size: int, mtime_ns: int) -> str:
    """Once a process for each state of a file: text encoders have 10 GB, and every stage loads them."""
    del size, mtime_ns
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def save_component(
    module: Any, folder: Path, dtype: torch.dtype, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write ``module`` in the published layout with its floating-point weights in ``dtype``; those that
    ``weights`` name have the values there."""
    from huggingface_hub import save_torch_state_dict

    state = {
        name: weights.get(name, tensor).detach().to("cpu", dtype).contiguous()
        for name, tensor in module.state_dict().items()
    }
    with quiet():
        module.save_config(folder)
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(state, folder, filename_pattern=pattern, max_shard_size="10GB")


def load_component(module: torch.nn.Module, source: Path) -> None:
    """Load every weight of ``module`` from a pipeline or component folder. Raises ModelError where a
    weight is missing, unexpected or of another shape."""
    from safetensors.torch import load_file

    folder = source / "transformer" if (source / "transformer").is_dir() else source
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no weights to start from: {str(source)!r} holds no safetensors file")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        with explained(str(file)):
            state |= load_file(file)
    if problems := misfit(module.state_dict(), state):
        raise ModelError(f"the weights in {str(folder)!r} do not fit: {problems}")
    module.load_state_dict(state)


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn what a loading library raises for ``path`` into one ModelError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{path!r} is gated: accept its licence on its hub page and log in with `hf auth login`, "
            "or give the path of a local folder"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub knows no model {path!r} that you may read: check the spelling, log in with "
            "`hf auth login` if it is private or gated, or give the path of a local folder"
        ) from error
    except ModelError:
        raise
    except Exception as error:
        hub = local_folder(path) is None and not Path(path).exists()
        advice = (
            "; if the hub cannot be reached, or the model is gated (accept its licence, then "
            "`hf auth login`), give the path of a local folder"
        )
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load {path!r}: {first}{advice if hub else ''}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' progress bars and advice: what matters is raised as an error."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [diffusers_logging, transformers_logging]
    levels = [module.get_verbosity() for module in loggers]
    for module in loggers:
        module.set_verbosity(logging.ERROR)
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # diffusers renames torch_dtype to dtype; the old name is what all versions understand
            warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
            yield
    finally:
        for module, level in zip(loggers, levels, strict=True):
            module.set_verbosity(level)


def _looks_local(path: str) -> bool:
    # a name that the hub would refuse, such as "models/", is a folder that is not there
    return not re.fullmatch(r"\w([\w.-]*\w)?/\w([\w.-]*\w)?", path, re.ASCII) or bool(
        re.search(r"--|\.\.|\.git$|.{97}", path)
    )
