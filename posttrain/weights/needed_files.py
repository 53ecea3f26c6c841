"""Finds the files that a component of a diffusers pipeline needs and its folder lacks.

The libraries do not miss all of them: without its vocabulary a tokenizer loads, and makes every word unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import ModelError
from posttrain.weights.files import json_object, weight_files

CONFIGS = {
    "Tokenizer": "tokenizer_config.json",
    "TokenizerFast": "tokenizer_config.json",
    "VLProcessor": "tokenizer_config.json",
    "Scheduler": "scheduler_config.json",
    "Processor": "preprocessor_config.json",
    "ProcessorFast": "preprocessor_config.json",
    "Extractor": "preprocessor_config.json",
}
"""Ending of a class's name -> its configuration. Every other class is a network's. Of a processor of texts
and images, the tokenizer is read alone."""
NETWORK_CONFIG = "config.json"
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("vocab.txt",),
    ("tokenizer.model",),
    ("sentencepiece.bpe.model",),
)
"""The sets of files that hold a tokenizer's vocabulary; one of them is enough."""


def config_of(kind: str) -> str:
    """The name of the configuration file of a component of the class ``kind``."""
    return next((file for ending, file in CONFIGS.items() if kind.endswith(ending)), NETWORK_CONFIG)


def lacking(folder: Path, index: Mapping[str, Any], left_out: Collection[str] = ()) -> str | None:
    """The files that components in ``index`` need and the pipeline's ``folder`` lacks; None if it has all.

    Components in ``left_out`` need none. Raises ModelError for a configuration that cannot be read.
    """
    needed = {n: kind for n, (_, kind) in listed(index).items() if n not in left_out}
    lost = [file for name, kind in needed.items() for file in _lost(folder / name, kind)]
    if not lost:
        return None
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    return f"{str(folder)!r} lacks {', '.join(lost[:3])}{more}"


def listed(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Name -> library and class of the components in a pipeline's ``index`` that are not marked as absent."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    }


def _lost(folder: Path, kind: str) -> Iterator[str]:
    """The files that the component of class ``kind`` needs and ``folder`` lacks."""
    if not folder.is_dir():
        yield f"the folder {folder.name}"
        return
    config = folder / (file := config_of(kind))
    if not config.is_file():
        yield f"{folder.name}/{file}"
    else:
        json_object(config.read_bytes(), config)
    if file == "tokenizer_config.json":
        if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
            there = {"vocab.json", "merges.txt"} & {path.name for path in folder.iterdir()}
            yield f"{folder.name}/{'merges.txt' if 'vocab.json' in there else 'tokenizer.json'}"
    elif file == NETWORK_CONFIG and not weight_files(folder) and not any(folder.glob("*.bin")):
        yield f"{folder.name}/*.safetensors"


def class_of(library: str, kind: str, component: str) -> Any:
    """The class ``kind`` of ``library``, as a pipeline's index names them for ``component``.

    Raises ModelError if it is not there."""
    import importlib

    if library in ("diffusers", "transformers"):
        found = getattr(importlib.import_module(library), kind, None)
        if found is not None:
            return found
    raise ModelError(
        f"model_index.json: {component} is a {kind} of {library}, which this install does not know; "
        "diffusers and transformers have the classes that can be loaded"
    )
