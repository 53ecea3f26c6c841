"""Writes the data of SimpleTuner's ``data_backend_config``: its first data set of images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.draft import Draft, value_of
from posttrain.importing.flags import Settings

FLAG = "data_backend_config"
READ = {
    "id", "type", "dataset_type", "disabled", "instance_data_dir", "dataset_name", "split",
    "caption_strategy", "resolution", "resolution_type",
}  # fmt: skip
"""Keys of a data set that are read."""
CACHES = ("cache_", "preserve_data_backend_cache", "text_embeds", "image_embeds", "write_batch_size")


def put_data(s: Settings, d: Draft, near: Path | None) -> None:
    """Write ``stage.data``. The file of data sets lies here or beside ``near``. Raises PosttrainError."""
    block = _backend(s, d, near)
    folder = block.get("instance_data_dir") or block.get("dataset_name")
    if folder is None:
        note = "yours: a folder of images with .txt captions, or a list"
        d.put("stage.data.images", "my-images", note=note)
        if FLAG in s:
            d.lost[FLAG] = "the file was not found, or names no folder of images: set data.images"
    else:
        d.put("stage.data.images", str(folder), FLAG)
        if block.get("type") == "huggingface":
            d.put("stage.data.split", str(block.get("split", "train")), FLAG)
    strategy = block.get("caption_strategy", s["caption_strategy"])
    if strategy in ("textfile", "parquet"):
        d.idle["caption_strategy"] = "captions are found beside the images or in the table"
    else:
        name = "caption_strategy" if "caption_strategy" in s else FLAG
        d.lost[name] = f"caption_strategy {strategy}: give captions in .txt files or a column (docs: Data)"
    _size(s, d, block)
    read = READ
    if not block.get("crop"):
        read = READ | {"crop"}
    elif block.get("crop_style") in ("center", "centre"):
        d.put("stage.data.crop", "center", FLAG)
        read = READ | {"crop", "crop_style"}
    for key in [key for key in block if key not in read]:
        cache = str(key).startswith(CACHES)
        told = d.more_idle if cache else d.more_lost
        words = "encodings are cached by the recipe's cache" if cache else "import-flags does not read it"
        name = block.get("id", "the first data set")
        told.append((f"--{FLAG}: {name}: {key}{value_of(block[key])}", words))


def _size(s: Settings, d: Draft, block: Mapping[str, Any]) -> None:
    """Write ``resolution``, the root of a bucket's area in pixels."""
    flag = FLAG if "resolution" in block else "resolution"
    kind = block.get("resolution_type", s["resolution_type"])
    side = s.number(flag, block.get("resolution", s["resolution"]))
    if side <= 0:
        raise s.refused(flag, "a number above 0")
    megapixels = kind == "area"
    pixels = round((side * 1e6) ** 0.5 / 64) * 64 if megapixels else round(side)
    d.put("stage.data.resolution", pixels, flag, note="megapixels" if megapixels else "")
    words = "resolution is the area of a bucket, not the length of an image's shorter side"
    if "resolution_type" in block:
        d.idle["resolution_type"] = "the data set has its own"
        if kind == "pixel":
            d.more_lost.append((f"--{FLAG}: resolution_type pixel", words))
    elif kind == "pixel":
        d.lost["resolution_type"] = words
    else:
        d.idle["resolution_type"] = "the area of a bucket, as here"
    if "resolution" in block:
        d.idle["resolution"] = "the data set has its own"


def _backend(s: Settings, d: Draft, near: Path | None) -> dict[str, Any]:
    """The first image data set of the file ``data_backend_config``; empty if there is no such file."""
    if not (path := s[FLAG]):
        return {}
    roots = [Path(), *(near.absolute().parents if near is not None else ())]
    file = next((root / path for root in roots if (root / path).is_file()), None)
    if file is None:
        return {}
    try:
        blocks = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise PosttrainError(f"{file} is not valid JSON: {error}") from None
    found: dict[str, Any] = {}
    for number, block in enumerate(blocks if isinstance(blocks, list) else [], 1):
        kind = block.get("dataset_type", "image") if isinstance(block, dict) else "no block"
        off = isinstance(block, dict) and block.get("disabled")
        if kind == "image" and not off and not found:
            found = block
            continue
        name = block.get("id", number) if isinstance(block, dict) else number
        shown = f"--data_backend_config: {name}"
        if off or kind in ("text_embeds", "image_embeds"):
            d.more_idle.append((shown, "it is disabled" if off else "the recipe's cache keeps encodings"))
        else:
            d.more_lost.append((shown, "a stage has one list of images: join the data sets in it"))
    return found
