"""Packs images and scores for the way between a run and a reward server, without changing a bit.

A request is a safetensors file. It has the tensor ``images`` (n, 3, h, w) float32, and in its metadata, as
JSON, ``prompts`` and ``rows`` (each prompt's row of the prompt file). An answer is JSON with ``value`` and
``details``, whose numbers have enough digits to give each float32 exactly. Neither format can hold code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from posttrain.reward import Scores

HEADER_LENGTH = struct.Struct("<Q")
"""A safetensors file begins with the length of its header in bytes."""


def packed(images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Pack n images (n, 3, h, w), prompts and rows into the body of a request."""
    texts = {"prompts": json.dumps(list(prompts)), "rows": json.dumps([dict(row) for row in rows])}
    return save({"images": images.detach().cpu().float().contiguous()}, texts)


def unpacked(body: bytes) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """The images, prompts and rows in the body of a request. Raises ValueError if it is malformed."""
    try:
        images = load(body)["images"]
        (length,) = HEADER_LENGTH.unpack_from(body)
        texts = json.loads(body[HEADER_LENGTH.size : HEADER_LENGTH.size + length])["__metadata__"]
        prompts, rows = json.loads(texts["prompts"]), json.loads(texts["rows"])
    except (SafetensorError, ValueError, KeyError, struct.error, RecursionError) as error:
        raise ValueError(
            f"not a safetensors file with 'images' and the metadata 'prompts' and 'rows': {error}"
        ) from error
    if images.dtype != torch.float32 or images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(
            f"images must be (n, 3, h, w) float32, not {tuple(images.shape)} {str(images.dtype)[6:]}"
        )
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be a list of texts")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("rows must be a list of objects")
    if not len(images) == len(prompts) == len(rows):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(rows)} rows do not match")
    return images, prompts, rows


def answer(scores: Scores) -> dict[str, Any]:
    """The JSON object that answers a request."""
    return {
        "value": scores.value.float().tolist(),
        "details": {name: values.float().tolist() for name, values in scores.details.items()},
    }


def scores_of(data: Any, count: int) -> Scores:
    """The scores in ``data``, an answer for ``count`` images. Raises ValueError if it is malformed."""
    if not isinstance(data, dict) or not isinstance(data.get("value"), list):
        raise ValueError("no list 'value' of scores")
    details = data.get("details", {})
    if not isinstance(details, dict):
        raise ValueError("'details' is not an object")
    return Scores(
        _tensor("value", data["value"], count),
        {str(name): _tensor(f"details.{name}", values, count) for name, values in details.items()},
    )


def _tensor(name: str, values: Any, count: int) -> Tensor:
    if not isinstance(values, list) or len(values) != count:
        given = f"{len(values)} numbers" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"{name}: {given} for {count} images")
    # bool is refused although Python counts it as an int: no reward server sends it
    if bad := [v for v in values if not isinstance(v, (int, float)) or isinstance(v, bool)]:
        raise ValueError(f"{name}: {bad[0]!r} is no number")
    try:
        tensor = torch.tensor([float(v) for v in values], dtype=torch.float32)
    except OverflowError as error:
        raise ValueError(f"{name}: {error}") from error
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: {values[int((~tensor.isfinite()).nonzero()[0])]} is no score")
    return tensor
