"""Reads the LoRA files that stages wrote, joins them, and writes them for other tools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError
from posttrain.weights.adapter import METADATA, PREFIX
from posttrain.weights.files import json_object
from posttrain.weights.hugging_face import explained
from posttrain.weights.single_file import Layers, SingleFile, fused_lora
from posttrain.weights.transformer import write_adapter
from posttrain.weights.writing import entries_of, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

A, B = ".lora_A.weight", ".lora_B.weight"


def write_joined(files: Sequence[Path], target: Path, dtype: torch.dtype | None) -> int:
    """Write the sum of the LoRA ``files`` as one, for diffusers and ComfyUI; returns its largest rank.

    The matrices of a layer are joined along the rank, which changes no product. Raises ModelError for a file
    that cannot be read.
    """
    layers, config = joined(files)
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"{PREFIX}{name}{A}": down, f"{PREFIX}{name}{B}": up}
    write_adapter(target, entries_of(tensors), config, dtype)
    return config["r"]


def write_kohya(files: Sequence[Path], target: Path, layout: SingleFile, dtype: torch.dtype | None) -> None:
    """As :func:`write_joined`, under the names of kohya's scripts, with ``.alpha``.

    ``layout`` gives the layers of the single-file checkpoint, which the names follow.
    """
    import torch

    layers, config = joined(files)
    tensors = {}
    for name, (down, up) in fused_lora(layers, layout.transformer).items():
        layer = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        tensors[f"{layer}.alpha"] = torch.tensor(float(len(down)))
    rank = str(config["r"])
    about = {"ss_network_module": layout.kohya_module, "ss_network_dim": rank, "ss_network_alpha": rank}
    write_tensors(target, entries_of(tensors), dtype, about)


def joined(files: Sequence[Path]) -> tuple[Layers, dict[str, Any]]:
    """The layers of the sum of the LoRA ``files``, of scale 1, and peft's configuration of it. Raises
    ModelError for a file that cannot be read, or has weights under other names than peft's."""
    import torch

    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    config: dict[str, Any] = {}
    for file in files:
        layers, config = _read(file)
        for name, layer in layers.items():
            parts.setdefault(name, []).append(layer)
    whole = {
        name: (torch.cat([down for down, _ in own]), torch.cat([up for _, up in own], dim=1))
        for name, own in parts.items()
    }
    rank = max(len(down) for down, _ in whole.values())
    others = {name: len(down) for name, (down, _) in whole.items() if len(down) != rank}
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)}
    return whole, config if len(files) == 1 else {**config, "target_modules": sorted(whole)}


def _read(file: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """The layers in ``file``, with the scale that it states multiplied into B, and peft's configuration.

    A stage may have started from a file of another tool.
    """
    from peft.utils.other import get_pattern_key
    from safetensors import safe_open

    with explained(str(file)), safe_open(file, framework="pt") as opened:
        stated = json_object((opened.metadata() or {}).get(METADATA, "{}").encode(), file)
        tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    config = {name.removeprefix(PREFIX): value for name, value in stated.items()}
    names = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    if others := sorted(tensors.keys() ^ {name + end for name in names for end in (A, B)}):
        raise ModelError(
            f"the LoRA {str(file)!r} cannot be joined with others: {len(others)} of its weights, such as "
            f"{others[0]!r}, are no pairs of lora_A.weight and lora_B.weight; the format 'merged' has them"
        )

    def scale(layer: str, rank: int) -> float:
        alphas = config.get("alpha_pattern") or {}
        alpha = alphas.get(get_pattern_key([*alphas], layer), config.get("lora_alpha", rank))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    layers = {}
    for name in names:
        layer, down = name.removeprefix(PREFIX), tensors[name + A]
        layers[layer] = down, scale(layer, len(down)) * tensors[name + B]
    return layers, config
