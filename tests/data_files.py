"""Images, JSONL files and folders of both, for tests of the data."""

import json

import numpy as np
from PIL import Image

from posttrain.data.decode import open_image

LIMIT = 178_956_970


def noise(width=24, height=16, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return values[..., 0] if channels == 1 else values


def pixels(path):
    return np.asarray(open_image(path, LIMIT)).astype(int)


def write_rows(folder, rows, name="train.jsonl"):
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def folder_of(folder, count=12, **changes):
    """``count`` PNGs named .jpg in two buckets, in HY-SOAR's format."""
    rows = []
    for i in range(count):
        width, height = ((16, 16), (32, 16))[i % 3 == 2]
        Image.fromarray(noise(width + 9, height + 5, seed=i)).save(folder / f"{i}.jpg", "PNG")
        rows.append({"md5": f"{i}", "caption_en": f"caption {i}", "bw": width, "bh": height} | changes)
    return write_rows(folder, rows)
