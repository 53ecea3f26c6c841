"""Writes and loads a transformer's weights and adapters, in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from posttrain.errors import ModelError
from posttrain.weights.adapter import METADATA, PREFIX
from posttrain.weights.files import PLAIN, weight_files
from posttrain.weights.fitting import described, misfit, not_finite
from posttrain.weights.hugging_face import explained
from posttrain.weights.needed_files import NETWORK_CONFIG
from posttrain.weights.network import advice
from posttrain.weights.writing import Entry, entries_of, write_network, write_tensors

if TYPE_CHECKING:
    import torch

ADAPTER = "default"
"""peft's name for the adapter that a stage trains."""
LORA = "pytorch_lora_weights.safetensors"
"""The file name under which diffusers looks for an adapter in a folder."""


def save_component(module: Any, folder: Path, dtype: torch.dtype, weights: Mapping[str, Entry]) -> None:
    """Write ``module`` to ``folder`` in diffusers' layout, its weights in ``dtype``, one at a time.

    ``weights``, by parameter name, replace the module's own. Raises ModelError for a weight that is not
    finite in ``dtype``.
    """
    own = entries_of(module.state_dict(keep_vars=True))
    folder.mkdir(parents=True, exist_ok=True)
    write_network(folder, PLAIN[0], {name: weights.get(name, entry) for name, entry in own.items()}, dtype)
    # under fsdp2 the module's class is one that torch made, whose name no library knows
    config = {**json.loads(module.to_json_string()), "_class_name": _library_class(module).__name__}
    config.pop("_name_or_path", None)  # where it was loaded from: a place on this machine
    (folder / NETWORK_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _library_class(module: Any) -> type:
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def load_component(module: torch.nn.Module, source: Path) -> None:
    """Load every weight of ``module`` from ``source``, a pipeline's folder or a component's.

    Raises ModelError if a weight is missing, left over, of another shape or kind of number, or not finite,
    also if it is so in the precision of ``module`` alone.
    """
    from safetensors.torch import load_file

    folder = source / "transformer" if (source / "transformer").is_dir() else source
    if not (files := weight_files(folder)):
        raise ModelError(f"no weights to start from: {str(source)!r} holds no safetensors file")
    state: dict[str, torch.Tensor] = {}
    for file in files:
        with explained(str(file)):
            state |= load_file(file)
    own = module.state_dict()
    fits(own, state, folder)
    module.load_state_dict({name: state[name] for name in own})
    if problems := described(overflowing=not_finite(own)):
        dtype = next(tensor.dtype for tensor in own.values() if tensor.is_floating_point())
        raise ModelError(f"the weights in {str(folder)!r} do not fit: {problems}{advice(problems, dtype)}")


def fits(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raise ModelError if ``state``, read from ``source``, does not fit the weights ``own`` of a network."""
    if problems := misfit(own, state):
        raise ModelError(f"the weights in {str(source)!r} do not fit: {problems}")


def adapter_entries(transformer: Any, weights: Mapping[str, Entry]) -> dict[str, Entry]:
    """Those of ``weights``, by parameter name, that are of the trained adapter, under diffusers' names."""
    from peft import get_peft_model_state_dict

    # peft changes names and looks at no value, so it need not have the values
    names: dict[str, Any] = {name: name for name in weights}
    renamed = cast("dict[str, str]", get_peft_model_state_dict(transformer, names, adapter_name=ADAPTER))
    return {name: weights[parameter] for name, parameter in renamed.items()}


def save_adapter(transformer: Any, folder: Path, weights: Mapping[str, Entry]) -> None:
    """Write the trained adapter of ``transformer`` to ``folder``, for diffusers' ``load_lora_weights``.

    The transformer has diffusers' PeftAdapterMixin. ``weights`` holds the adapter's, by parameter name.
    Its scale, alpha / rank, is multiplied into B, and the file states alpha = rank. So tools that read the
    file's metadata and tools that take scale 1 without an ``.alpha`` tensor, as ComfyUI does, draw the same
    picture; diffusers refuses a file with such tensors.
    """
    config = transformer.peft_config[ADAPTER].to_dict()
    scale, rank = config["lora_alpha"] / config["r"], config["r"]
    entries = {
        f"{PREFIX}{name}": entry.then(lambda tensor: tensor * scale) if ".lora_B." in name else entry
        for name, entry in adapter_entries(transformer, weights).items()
    }
    write_adapter(folder / LORA, entries, {**config, "lora_alpha": rank})


def write_adapter(
    file: Path,
    entries: Mapping[str, Entry],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``entries``, under the names of the file, with peft's ``config``; equal ones make equal files."""
    text = json.dumps({PREFIX + k: v for k, v in config.items()}, indent=2, sort_keys=True, default=sorted)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, entries, dtype, {METADATA: text})
