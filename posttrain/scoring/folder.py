"""Scores image files, each with its prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from posttrain.data.decode import open_image
from posttrain.data.lines import string
from posttrain.data.prompts import read_prompts
from posttrain.errors import DataError
from posttrain.scoring.batches import Row, load_scorers
from posttrain.support.images import is_grid
from posttrain.support.paths import is_file, is_folder

if TYPE_CHECKING:
    from posttrain.reward import Reward, Scorer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".gif", ".tif", ".tiff")
"""Files in a folder with one of these suffixes count as images."""
MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded, as they may be decompression bombs."""


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths``, and the images in the folders among them, sorted by name.

    Hidden files of a folder, and grids of images that posttrain wrote, are left out. Raises DataError for a
    file that does not exist or a folder without images.
    """
    files = []
    for path in paths:
        if not is_folder(path):
            files.append(path)
            continue
        visible = (p for p in path.iterdir() if not p.name.startswith("."))
        found = sorted(p for p in visible if p.suffix.lower() in SUFFIXES)
        if not (images := [file for file in found if not is_grid(file)]):
            what = f"only grids of images ({found[0].name})" if found else "no image"
            below = ", not in its subfolders" if any(p.is_dir() for p in path.iterdir()) else ""
            raise DataError(f"{path}: {what} in this folder (looked for {', '.join(SUFFIXES)}{below})")
        files += images
    if missing := next((file for file in files if not is_file(file)), None):
        raise DataError(f"no file {str(missing)!r} (looked at {missing.absolute()})")
    return files


def with_prompts(
    images: Sequence[Path], prompts: Path | None, prompt: str | None, rewards: Sequence[Reward] = ()
) -> list[tuple[Path, Row]]:
    """Pair each image with its prompt's row, from the file ``prompts`` or from one ``prompt`` for all.

    If the rows have a field ``image``, it names the file; else rows and images are paired in order. Raises
    DataError if an image has no prompt, if one of ``rewards`` cannot score a prompt, or if the order is in
    doubt.
    """
    if (prompts is None) == (prompt is None):
        raise DataError("say what the images should show: --prompts FILE, or --prompt TEXT for all")
    if prompt is not None:
        try:
            row = {"prompt": string({"prompt": prompt}, "prompt")}
        except ValueError as error:
            raise DataError(f"--prompt: {error}") from error
        if reasons := [reason for reward in rewards if (reason := reward.prompt_problem(row)) is not None]:
            raise DataError(f"--prompt cannot be scored: {'; '.join(reasons)}")
        return [(image, row) for image in images]
    assert prompts is not None
    rows = read_prompts(prompts, rewards)
    named = sum("image" in row for row in rows)
    if 0 < named < len(rows):
        raise DataError(f"{prompts}: {named} of {len(rows)} rows name their 'image'; all must, or none")
    if named:
        return _paired_by_name(images, prompts, rows)
    if len(rows) != len(images):
        raise DataError(f"{len(images)} images and {len(rows)} prompts in {prompts}: one for each is needed")
    _check_order(images, prompts)
    return list(zip(images, rows, strict=True))


def score_images(
    images: Iterable[tuple[Image.Image, Row]], scorers: Mapping[str, Scorer], batch_size: int
) -> Iterator[dict[str, float]]:
    """Yield, for each 8-bit RGB image in turn, its scores by reward, with details as ``reward/detail``.

    A batch holds up to ``batch_size`` images that follow each other and have the same size.
    """
    for batch in _batches(images, batch_size):
        pixels = np.stack([np.asarray(image) for image, _ in batch])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
        rows = [row for _, row in batch]
        prompts = [row["prompt"] for row in rows]
        scores = {name: score(tensor, prompts, rows) for name, score in scorers.items()}
        for i in range(len(batch)):
            yield {k: v for name, of in scores.items() for k, v in of.named(name, i).items()}


def score_files(
    items: Sequence[tuple[Path, Row]], rewards: Sequence[Reward], device: torch.device, batch_size: int
) -> list[dict[str, Any]]:
    """Score the files in ``items``; return a record of file, prompt, tag and scores for each.

    Raises DataError for a file that is not an image, and RewardError if a score cannot be computed.
    """
    scorers = load_scorers(rewards, device)
    images = ((open_image(path, MAX_PIXELS), row) for path, row in items)
    return [
        {"image": str(path), "prompt": row["prompt"], "tag": row.get("tag"), "scores": scores}
        for (path, row), scores in zip(items, score_images(images, scorers, batch_size), strict=True)
    ]


def _paired_by_name(images: Sequence[Path], prompts: Path, rows: Sequence[Row]) -> list[tuple[Path, Row]]:
    by_name: dict[str, Path] = {}
    for image in images:
        if (other := by_name.setdefault(image.name, image)) != image:
            raise DataError(
                f"{str(other)!r} and {str(image)!r} have the same name; "
                f"{prompts} names images without their folder, so names must differ"
            )
    pairs = []
    for row in rows:
        try:
            name = Path(string(dict(row), "image")).name
        except ValueError as error:
            raise DataError(f"{prompts}: {error}") from error
        if name not in by_name:
            raise DataError(f"{prompts}: image {row['image']!r} is none of the {len(images)} images given")
        pairs.append((by_name[name], row))
    if unnamed := sorted(set(by_name) - {image.name for image, _ in pairs}):
        raise DataError(
            f"{len(images)} images and {len(rows)} rows in {prompts}: "
            f"no row names {', '.join(unnamed[:3])}{' ...' * (len(unnamed) > 3)}"
        )
    return pairs


def _check_order(images: Sequence[Path], prompts: Path) -> None:
    """Raise DataError if the names are in the order of texts where their numbers say another one: ``10.png``
    before ``2.png``. Images would get each other's prompts."""
    for one, following in pairwise(images):
        before, after = (re.split(r"(\d+)", image.stem) for image in (one, following))
        alike = one.parent == following.parent and before[::2] == after[::2]
        if alike and one.name < following.name and _numbers(before) > _numbers(after):
            raise DataError(
                f"{prompts}: its rows belong to the images in the order of their names, and {one.name!r} "
                f"comes before {following.name!r}: number the files with equally many digits, or name each "
                "row's file by 'image'"
            )


def _numbers(parts: Sequence[str]) -> list[int]:
    """The numbers in a name that was split at them."""
    return [int(part) for part in parts[1::2]]


def _batches(
    images: Iterable[tuple[Image.Image, Row]], batch_size: int
) -> Iterator[list[tuple[Image.Image, Row]]]:
    batch: list[tuple[Image.Image, Row]] = []
    for image, row in images:
        if batch and (len(batch) == batch_size or image.size != batch[0][0].size):
            yield batch
            batch = []
        batch.append((image, row))
    if batch:
        yield batch
