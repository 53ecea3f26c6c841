"""How good are images that are on disk already?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from posttrain.data.decode import open_image
from posttrain.data.lines import string
from posttrain.data.prompts import read_prompts
from posttrain.errors import DataError
from posttrain.scoring.batches import scorers_of

if TYPE_CHECKING:
    from posttrain.reward import Reward, Scorer

Row = Mapping[str, Any]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".gif", ".tif", ".tiff")
"""What is taken for an image in a folder."""
MAX_PIXELS = 178_956_970
"""An image of more is refused before it is decoded (decompression bomb)."""


def found_images(given: Sequence[Path]) -> list[Path]:
    """The files among ``given``, and the images in its folders in the order of their names."""
    files = []
    for path in given:
        inside = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        )
        if not inside:
            raise DataError(f"{path}: no image in this folder (looked for {', '.join(SUFFIXES)})")
        files += inside
    if missing := next((file for file in files if not file.is_file()), None):
        raise DataError(f"no file {str(missing)!r} (looked at {missing.absolute()})")
    return files


def with_prompts(
    images: Sequence[Path], prompts: Path | None, prompt: str | None, rewards: Sequence[Reward] = ()
) -> list[tuple[Path, Row]]:
    """(image, its prompt with metadata), from a file of one row an image, or one prompt for all.

    Rows with ``image`` name their file; others go with the images in order. Raises DataError where not
    each image has a prompt, or one of ``rewards`` cannot score a prompt.
    """
    if (prompts is None) == (prompt is None):
        raise DataError("say what the images should show: --prompts FILE, or --prompt TEXT for all")
    if prompt is not None:
        row = {"prompt": string({"prompt": prompt}, "prompt")}
        if reasons := [reason for reward in rewards if (reason := reward.unusable(row)) is not None]:
            raise DataError(f"--prompt cannot be scored: {'; '.join(reasons)}")
        return [(image, row) for image in images]
    assert prompts is not None
    rows = read_prompts(prompts, rewards)
    named = [row for row in rows if "image" in row]
    if named and len(named) < len(rows):
        raise DataError(f"{prompts}: {len(named)} of {len(rows)} rows name their 'image'; all must, or none")
    if named:
        return _by_name(images, prompts, rows)
    if len(rows) != len(images):
        raise DataError(f"{len(images)} images and {len(rows)} prompts in {prompts}: one for each is needed")
    return list(zip(images, rows, strict=True))


def scored(
    images: Iterable[tuple[Image.Image, Row]], scorers: Mapping[str, Scorer], batch_size: int
) -> Iterator[dict[str, float]]:
    """Reward, or ``reward/detail``, -> score, of each image in turn. Equal sizes in a row go together."""
    for batch in _batches(images, batch_size):
        pixels = np.stack([np.asarray(image) for image, _ in batch])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
        rows = [row for _, row in batch]
        found = {name: score(tensor, [r["prompt"] for r in rows], rows) for name, score in scorers.items()}
        for i in range(len(batch)):
            yield {k: v for name, result in found.items() for k, v in result.named(name, i).items()}


def score_files(
    items: Sequence[tuple[Path, Row]], rewards: Sequence[Reward], device: torch.device, batch_size: int
) -> list[dict[str, Any]]:
    """One record an image: its file, prompt, tag and scores. Raises DataError, RewardError."""
    scorers = scorers_of(rewards, device)
    opened = ((open_image(path, MAX_PIXELS), row) for path, row in items)
    return [
        {"image": str(path), "prompt": row["prompt"], "tag": row.get("tag"), "scores": scores}
        for (path, row), scores in zip(items, scored(opened, scorers, batch_size), strict=True)
    ]


def _by_name(images: Sequence[Path], prompts: Path, rows: Sequence[Row]) -> list[tuple[Path, Row]]:
    by_name: dict[str, Path] = {}
    for image in images:
        if (other := by_name.setdefault(image.name, image)) != image:
            raise DataError(f"{str(other)!r} and {str(image)!r} have one name, by which rows name images")
    found = []
    for row in rows:
        name = Path(string(dict(row), "image")).name
        if name not in by_name:
            raise DataError(f"{prompts}: image {row['image']!r} is none of the {len(images)} images given")
        found.append((by_name[name], row))
    if spare := sorted(set(by_name) - {image.name for image, _ in found}):
        words = f"{len(images)} images and {len(rows)} rows in {prompts}"
        raise DataError(f"{words}: no row names {', '.join(spare[:3])}{' ...' * (len(spare) > 3)}")
    return found


def _batches(images: Iterable[tuple[Image.Image, Row]], most: int) -> Iterator[list[tuple[Image.Image, Row]]]:
    batch: list[tuple[Image.Image, Row]] = []
    for image, row in images:
        if batch and (len(batch) == most or image.size != batch[0][0].size):
            yield batch
            batch = []
        batch.append((image, row))
    if batch:
        yield batch
