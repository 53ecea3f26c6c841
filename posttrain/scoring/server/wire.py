"""Packs images for the way from a run to a reward server, without changing a bit.

A request is a safetensors file. It has the tensor ``images`` (n, 3, h, w) float32, and in its metadata, as
JSON, ``prompts`` and ``rows`` (each prompt's row of the prompt file). An answer is JSON with ``value`` and
``details`` (:mod:`posttrain.scoring.server.answers`), and ``name``, the reward's. A refusal is JSON with
``error``, the reason, and where images or scores are not finite ``not_finite``, their places in the request.
None of these formats can hold code.

Nothing in either is compressed. So what a request needs in memory is bounded by its size, and by the limits
below on its text and images, which are far above what a run sends.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from posttrain.support.wording import shown

HEADER_LENGTH = struct.Struct("<Q")
"""A safetensors file begins with the length of its header in bytes."""
FLOAT_BYTES = 4
MAX_TEXT_BYTES = 4_000_000
"""Largest header, with prompts and rows. As Python objects they may take 20 times as much."""
MAX_IMAGES = 4096
"""Most images in one request."""
MAX_SIDE = 8192
MAX_ASPECT = 16
"""Largest height and width, and longer side over shorter. A reward that resizes the shorter side of a strip
to its network's 224 pixels would need a thousand times the memory of the request."""
MAX_NESTING = 32
"""Lists and objects within one another in a row."""


def packed(images: Tensor, prompts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Pack n images (n, 3, h, w), prompts and rows into the body of a request."""
    texts = {"prompts": json.dumps(list(prompts)), "rows": json.dumps([dict(row) for row in rows])}
    return save({"images": images.detach().cpu().float().contiguous()}, texts)


def unpacked(body: bytearray) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """The images, prompts and rows in the body of a request. Raises ValueError if it is malformed.

    The images are not copied, but stay where they are in ``body``.
    """
    header, start = _header(body)
    try:
        texts = header["__metadata__"]
        prompts, rows = json.loads(texts["prompts"]), json.loads(texts["rows"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the metadata must have 'prompts' and 'rows' as JSON: {_reason(error)}") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be a list of texts")
    if surrogate := next((prompt for prompt in prompts if not _is_text(prompt)), None):
        raise ValueError(f"the prompt {shown(surrogate)} holds half a character (a lone surrogate)")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("rows must be a list of objects")
    if _nesting(rows) > MAX_NESTING + 1:
        raise ValueError(f"a row nests lists and objects more than {MAX_NESTING} deep")
    data = memoryview(body)[start:]
    images = _images(header, data if start % FLOAT_BYTES == 0 else bytearray(data))
    if not len(images) == len(prompts) == len(rows):
        raise ValueError(f"{len(images)} images, {len(prompts)} prompts and {len(rows)} rows do not match")
    return images, prompts, rows


def _header(body: bytearray) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    if len(body) < HEADER_LENGTH.size:
        raise ValueError(f"not a safetensors file: it has {len(body)} bytes")
    (length,) = HEADER_LENGTH.unpack_from(body)
    start = HEADER_LENGTH.size + length
    if start > len(body):
        raise ValueError(f"not a safetensors file: a header of {length} bytes in a file of {len(body)}")
    if length > MAX_TEXT_BYTES:
        raise ValueError(f"prompts and rows have {length} bytes; at most {MAX_TEXT_BYTES} are taken")
    try:
        header = json.loads(body[HEADER_LENGTH.size : start])
    except (ValueError, RecursionError) as error:  # ValueError: also if it is not UTF-8
        raise ValueError(f"not a safetensors file: its header is not JSON: {_reason(error)}") from error
    if not isinstance(header, dict) or header.keys() != {"__metadata__", "images"}:
        found = list(header) if isinstance(header, dict) else header
        raise ValueError(f"the file must hold one tensor, 'images', and metadata; it has {shown(found)}")
    return header, start


def _images(header: Mapping[str, Any], data: memoryview | bytearray) -> Tensor:
    """The images that ``header`` describes, in ``data``."""
    described = header["images"] if isinstance(header["images"], dict) else {}
    dtype, shape = described.get("dtype"), described.get("shape")
    sizes = shape if isinstance(shape, list) else []
    # type, not isinstance: Python counts a bool as an int
    positive = all(type(size) is int and size > 0 for size in sizes)
    if dtype != "F32" or len(sizes) != 4 or not positive or sizes[1] != 3:
        raise ValueError(
            f"images must be (n, 3, h, w) float32, not of shape {shown(shape)} and type {shown(dtype)}"
        )
    count, _, height, width = sizes
    if count > MAX_IMAGES:
        raise ValueError(f"{count} images; at most {MAX_IMAGES} are taken in one request")
    long, short = max(height, width), min(height, width)
    if long > MAX_SIDE or long > MAX_ASPECT * short:
        raise ValueError(
            f"images of {height} x {width}; sides may have up to {MAX_SIDE} pixels, and the longer side "
            f"up to {MAX_ASPECT} times the shorter"
        )
    size = FLOAT_BYTES * count * 3 * height * width
    if described.get("data_offsets") != [0, size] or len(data) != size:
        raise ValueError(f"images of {tuple(sizes)} need {size} bytes, not {len(data)}")
    return torch.frombuffer(data, dtype=torch.float32).view(sizes)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _nesting(value: Any) -> int:
    """How many lists and objects in ``value`` lie within one another at most."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (list, dict))]:
        depth += 1
        level = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
    return depth


def _reason(error: Exception) -> str:
    return "it nests too deep" if isinstance(error, RecursionError) else str(error)
