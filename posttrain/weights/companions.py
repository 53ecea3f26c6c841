"""Writes the components of a pipeline that were not trained, so that plain diffusers runs the pipeline.

diffusers loads its own networks in float32 unless it is told otherwise, and transformers loads a text encoder
in the precision that the encoder's ``config.json`` names. So that configuration names float32 here, whatever
precision the file has. With ``torch_dtype`` both libraries load the precision that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.support.files import copy
from posttrain.weights.files import PLAIN, json_object
from posttrain.weights.needed_files import NETWORK_CONFIG, config_of, listed
from posttrain.weights.pipeline_folder import WEIGHTS, component_files, index_in
from posttrain.weights.writing import entries_in, write_network

if TYPE_CHECKING:
    import torch


def write_components(origin: Path, folder: Path, names: Iterable[str], dtype: torch.dtype) -> None:
    """Write the components ``names`` of the pipeline at ``origin`` to ``folder``, their weights in ``dtype``.

    A component that has this precision is copied: the files share nothing with the base, so that neither
    changes with the other, but where the file system can (btrfs, xfs) they keep the same blocks until one is
    written, and take no room and no time. Another one is converted tensor by tensor. Raises ModelError for a
    weight that is not finite in ``dtype``.
    """
    kinds = listed(index_in(origin))
    for name in sorted(names):
        (target := folder / name).mkdir(parents=True, exist_ok=True)
        library, kind = kinds[name]
        files = list(component_files(origin, [name]).values())
        network = config_of(kind) == NETWORK_CONFIG
        weights = [file for file in files if file.suffix in WEIGHTS] if network else []
        if any(own != dtype for own in _precisions(weights)):
            plain = PLAIN[1] if library == "transformers" else PLAIN[0]
            write_network(target, plain, entries_in(weights), dtype)
            files = [f for f in files if f not in weights and not f.name.endswith(".index.json")]
        for file in files:
            copy(file, target / file.name)
        if network and library == "transformers" and not _loads_in_float32(config := target / NETWORK_CONFIG):
            changed = {**json_object(config.read_bytes(), config), "dtype": "float32"}
            changed.pop("torch_dtype", None)
            config.write_text(json.dumps(changed, indent=2) + "\n", "utf-8")


def _precisions(weights: Iterable[Path]) -> set[torch.dtype]:
    """The precisions of the floats in ``weights``."""
    return {entry.dtype for entry in entries_in(weights).values() if entry.dtype.is_floating_point}


def _loads_in_float32(config: Path) -> bool:
    found = json_object(config.read_bytes(), config)
    return found.get("dtype") == "float32" and "torch_dtype" not in found
