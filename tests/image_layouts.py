"""The same images and captions in every layout, for tests of the data."""

import csv
import io
import json
import tarfile

import numpy as np
from data_files import noise, write_rows
from PIL import Image

COUNT = 12
SIZES = ((25, 21), (41, 21))
"""Sizes of the images in pixels: of every third the second one."""


def png(i):
    buffer = io.BytesIO()
    width, height = SIZES[i % 3 == 2]
    Image.fromarray(noise(width, height, seed=i)).save(buffer, "PNG")
    return buffer.getvalue()


def name(i):
    """Names in the order of their numbers, in two folders."""
    return f"{'ab'[i >= COUNT // 2]}/{i:02}"


def columns(i):
    return {"source": f"book {i}", "weight": 1.0 + i % 4}


def write_images(folder):
    for i in range(COUNT):
        file = folder / f"{name(i)}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))


def with_captions(folder):
    write_images(folder)
    for i in range(COUNT):
        (folder / f"{name(i)}.txt").write_text(f"caption {i}\n")
    return folder


def with_jsonl(folder):
    write_images(folder)
    rows = [{"image": f"{name(i)}.png", "caption": f"caption {i}", **columns(i)} for i in range(COUNT)]
    return write_rows(folder, rows)


def with_metadata(folder):
    write_images(folder)
    rows = [{"file_name": f"{name(i)}.png", "text": f"caption {i}", **columns(i)} for i in range(COUNT)]
    write_rows(folder, rows, "metadata.jsonl")
    return folder


def with_csv(folder):
    write_images(folder)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", "source", "weight"])
        writer.writerows([f"{name(i)}.png", f"caption {i}", *columns(i).values()] for i in range(COUNT))
    return folder


def add(tar, member, content):
    about = tarfile.TarInfo(member)
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


def with_tars(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for shard, numbers in (("0.tar", range(5)), ("1.tar", range(5, COUNT))):
        with tarfile.open(folder / shard, "w") as tar:
            for i in numbers:
                add(tar, f"{name(i)}.png", png(i))
                add(tar, f"{name(i)}.txt", f"caption {i}\n".encode())
                add(tar, f"{name(i)}.json", json.dumps(columns(i)).encode())
    return folder


def with_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(i), "path": f"{i:02}.png"} for i in range(COUNT)]
    rows = {"image": images, "text": [f"caption {i}" for i in range(COUNT)]}
    rows |= {key: [columns(i)[key] for i in range(COUNT)] for key in columns(0)}
    pq.write_table(pa.table(rows), folder / "train-00000-of-00001.parquet", row_group_size=5)
    return folder


LAYOUTS = {
    "jsonl": with_jsonl, "captions": with_captions, "metadata": with_metadata, "csv": with_csv, "tars": with_tars,
    "parquet": with_parquet,
}  # fmt: skip
EXTRA = {layout for layout in LAYOUTS if layout != "captions"}
"""The layouts that have other columns."""


def pixels_of(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
