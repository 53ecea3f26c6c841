"""Loads a LoRA onto a transformer, and accounts for every one of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ModelError
from posttrain.weights.files import json_object
from posttrain.weights.fitting import described, kind_of, not_finite
from posttrain.weights.hugging_face import explained, quiet

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "transformer."
"""Names in the file begin with this. Those of text encoders begin otherwise, and are refused: a stage trains
the transformer alone, and encodings are kept by the weights of the base."""
METADATA = "lora_adapter_metadata"
"""The entry of the file's metadata in which peft's configuration is kept, as JSON."""


def load_adapter(transformer: Any, file: Path, *, merge: bool, pipeline: Any = None) -> None:
    """Add the adapter in ``file`` to ``transformer``, which has diffusers' PeftAdapterMixin.

    It is merged into the weights, or stays an active adapter beside them. The ``pipeline``, if given, reads
    the formats of other tools. Raises ModelError if a weight is missing, matches no layer, is of another
    shape or kind of number, or is not finite, also after merging. diffusers passes over names that match
    nothing.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    with quiet(), explained(str(file)):
        raw = load_file(file)
        _check(file, _metadata_problem(file))
        state = _under_own_names(raw, file, pipeline)
        _check(file, described(**_faults(transformer, raw, state)))
        name = next_adapter(transformer)
        options = {"adapter_name": name, "weight_name": file.name}
        if pipeline is None:
            transformer.load_lora_adapter(str(file.parent), **options)
        else:
            pipeline.load_lora_weights(str(file.parent), **options)
        landed = get_peft_model_state_dict(transformer, adapter_name=name)
        missing, left_over = sorted(landed.keys() - state.keys()), sorted(state.keys() - landed.keys())
        _check(file, described(missing=missing, left_over=left_over))
        if merge:
            transformer.fuse_lora(adapter_names=[name])
            transformer.unload_lora()
            if infinite := described(infinite=not_finite(transformer.state_dict())):
                raise ModelError(f"the LoRA {str(file)!r} spoils the weights it is merged into: {infinite}")


def next_adapter(transformer: Any) -> str:
    """A name that no adapter of ``transformer`` has yet: ``before_0``, ``before_1``, and so on."""
    return f"before_{len(getattr(transformer, 'peft_config', None) or {})}"


def _check(file: Path, problems: str | None) -> None:
    if problems:
        raise ModelError(f"the LoRA {str(file)!r} does not fit: {problems}")


def _metadata_problem(file: Path) -> str | None:
    """Say what is wrong with the rank and the scale that ``file`` states; None if it states none."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(METADATA)
    if text is None:
        return None  # then the scale is 1
    stated = json_object(text.encode(), file)
    own = {name.removeprefix(PREFIX): value for name, value in stated.items()}
    for field in ("r", "lora_alpha"):
        value = own.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            return f"its {METADATA} states {value!r} as {field}, which must be a positive number"
    return None


def _under_own_names(raw: Mapping[str, Tensor], file: Path, pipeline: Any) -> dict[str, Tensor]:
    """The tensors ``raw`` of ``file`` under peft's names: the layer's, then ``lora_A.weight`` and so on.

    Names outside the transformer keep their prefix. Raises ModelError where all names are outside.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    if not raw:
        raise ModelError(f"the LoRA {str(file)!r} holds no weights")
    read = (
        dict(raw) if pipeline is None else pipeline.lora_state_dict(str(file.parent), weight_name=file.name)
    )
    named = read[0] if isinstance(read, tuple) else read
    if not any(name.startswith(PREFIX) for name in named):
        _check(file, f"its names, such as {min(named)!r}, do not begin with {PREFIX!r}")
    state = {name.removeprefix(PREFIX): tensor for name, tensor in named.items()}
    return state if any("lora_A" in name for name in state) else convert_unet_state_dict_to_peft(state)


def _faults(transformer: Any, raw: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is wrong with the adapter ``state``, as :func:`posttrain.weights.fitting.described` takes it."""
    layers = dict(transformer.named_modules())
    expected = dict(_expected(layers, state))
    # diffusers leaves the magnitudes of DoRA out
    left_over = [name for name in state if name not in expected] + [n for n in raw if "dora_scale" in n]
    return {
        "missing": [name for name in expected if name not in state],
        "left_over": left_over,
        "shapes": [(n, state[n].shape, s) for n, s in expected.items() if n in state and state[n].shape != s],
        "kinds": [(n, k, "floats") for n, t in raw.items() if (k := kind_of(t)) != "floats"],
        "infinite": not_finite(raw),
    }


def _expected(
    layers: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name -> shape of the tensors that an adapter needs for each layer that ``state`` names.

    A (rank, in) and B (out, rank) belong together. The rank is that of A, or of B where A is missing.
    """
    for layer in dict.fromkeys(name.partition(".lora_")[0] for name in state):
        weight = getattr(layers.get(layer), "weight", None)
        if weight is None or weight.dim() not in (2, 4):  # a linear layer, or a convolution
            continue
        down, up, bias = (f"{layer}.lora_{end}" for end in ("A.weight", "B.weight", "B.bias"))
        rank = state[down].shape[0] if down in state else state[up].shape[1] if up in state else 0
        yield down, (rank, *weight.shape[1:])
        yield up, (weight.shape[0], rank, *[1] * (weight.dim() - 2))
        if bias in state:
            yield bias, (weight.shape[0],)
