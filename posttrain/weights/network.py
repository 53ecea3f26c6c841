"""Loads a network from its folder with the library that wrote it, and accounts for every weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError
from posttrain.weights.files import file_header, headers, weight_files
from posttrain.weights.fitting import described, harmless, is_finite, kind_of, not_finite
from posttrain.weights.hugging_face import explained, quiet
from posttrain.weights.needed_files import NETWORK_CONFIG

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load_network(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The network of class ``kind``, of diffusers or transformers, in ``folder``, its weights in ``dtype``.

    Raises ModelError if a weight is missing, left over, of another shape or kind of number, or not finite,
    also if it is so in ``dtype`` alone. The libraries themselves take random values for what is missing.
    """
    with quiet(), explained(str(folder)):
        found = headers(folder)
        network, info = kind.from_pretrained(
            folder, torch_dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        own = network.state_dict()
        # of what an index lists and no shard holds, diffusers makes no number, and does not tell
        without_numbers = {name for name, tensor in own.items() if tensor.is_meta}
        missing = {*info["missing_keys"], *(without_numbers - {name for name, *_ in info["mismatched_keys"]})}
        wrong = [] if missing or info["mismatched_keys"] else not_finite(own)
        overflowing = [] if dtype.itemsize > 2 else _finite_in_file(folder, wrong)
        problems = described(
            missing=sorted(missing),
            left_over=sorted(info["unexpected_keys"]),
            shapes=sorted(info["mismatched_keys"]),
            kinds=_other_kinds(found, own),
            infinite=[name for name in wrong if name not in overflowing],
            overflowing=overflowing,
        )
    if problems:
        raise ModelError(f"the weights in {str(folder)!r} do not fit: {problems}{advice(problems, dtype)}")
    return network


def check_headers(network: Any, folder: Path) -> None:
    """Raise ModelError if the weights in ``folder`` have other names, shapes or kinds of number than those of
    ``network``, of diffusers, which may be on torch's meta device.

    Only headers are read. Without a safetensors file nothing is checked.
    """
    if not (found := headers(folder)):
        return
    network._fix_state_dict_keys_on_load(found)  # diffusers' own: old names of attention become the new ones
    own = {name: (kind_of(tensor), tuple(tensor.shape)) for name, tensor in network.state_dict().items()}
    passed_over = network._keys_to_ignore_on_load_unexpected or ()
    shared = [name for name in own if name in found]
    problems = described(
        missing=[name for name in own if name not in found],
        left_over=[n for n in found if n not in own and not any(re.search(p, n) for p in passed_over)],
        shapes=[(n, found[n][1], own[n][1]) for n in shared if found[n][1] != own[n][1]],
        kinds=[(n, k, own[n][0]) for n in shared if (k := kind_of(found[n][0])) != own[n][0]],
    )
    if problems:
        raise ModelError(f"the weights in {str(folder)!r} do not fit its {NETWORK_CONFIG}: {problems}")


def advice(problems: str, dtype: torch.dtype) -> str:
    """What to do about ``problems`` that come from ``dtype`` alone."""
    import torch

    if "too large for the precision" not in problems:
        return ""
    return (
        f". The largest {str(dtype).removeprefix('torch.')} is {torch.finfo(dtype).max:g}: use bf16 or fp32"
    )


def _other_kinds(
    found: dict[str, tuple[str, tuple[int, ...]]], own: dict[str, Tensor]
) -> Iterable[tuple[str, str, str]]:
    """Each name in the file whose kind of number is not the network's, with both. A name that the loader
    changes must be of floats, as all weights are."""
    for name, (dtype, _) in found.items():
        wanted = kind_of(own[name]) if name in own else "floats"
        if kind_of(dtype) != wanted and not harmless(name):
            yield name, kind_of(dtype), wanted


def _finite_in_file(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are finite in the files of ``folder``."""
    from safetensors import safe_open

    wanted, finite = set(names), []
    for file in weight_files(folder) if wanted else ():
        with safe_open(file, framework="pt") as tensors:
            finite += [n for n in file_header(file) if n in wanted and is_finite(tensors.get_tensor(n))]
    return finite
