"""Converts samples to images, saves them, and makes grids with captions."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from torch import Tensor

GRID_MARK = ("posttrain-grid", "a grid of images, none to be scored")
"""The text in the metadata of a grid."""
EXIF_PROMPT = 5000
"""A JPEG has room for 65,533 bytes of EXIF data, and a character may take 12 of them."""
PADDING, LEAST_TILE, FONT = 6, 128, 12


def to_pil(images: Tensor) -> list[Image.Image]:
    """``images`` (n, 3, h, w) in [0, 1] as 8-bit RGB, clamped and rounded to the nearest value."""
    data = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(pixels) for pixels in data]


def save_image(
    image: Image.Image, folder: Path, number: int, record: Mapping[str, Any], kind: Literal["png", "jpeg"]
) -> Path:
    """Write one sample with ``record`` as JSON in its metadata; the name has number, prompt and index.

    The metadata is the text ``posttrain`` in a PNG, and the EXIF image description in a JPEG (quality 95,
    4:4:4), with at most EXIF_PROMPT characters of the prompt.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", record["prompt"].lower()).strip("-")[:60]
    file = folder / f"{number:05d}-{slug}-{record['index']}.{'png' if kind == 'png' else 'jpg'}"
    if kind == "png":
        info = PngInfo()
        info.add_text("posttrain", json.dumps(record))
        image.save(file, pnginfo=info)
        return file
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps({**record, "prompt": record["prompt"][:EXIF_PROMPT]})
    image.save(file, quality=95, subsampling=0, exif=exif)
    return file


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file of ``image``."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def grid_png(sheet: Image.Image) -> bytes:
    """The bytes of a PNG file of the grid ``sheet``, which is marked as one (:func:`is_grid`)."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text(*GRID_MARK)
    sheet.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def is_grid(file: Path) -> bool:
    """Whether ``file`` is a grid of images that posttrain wrote. What is no image is no grid."""
    if file.suffix.lower() != ".png":
        return False
    try:
        with Image.open(file) as image:  # reads the header, not the pixels
            return image.info.get(GRID_MARK[0]) == GRID_MARK[1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def grid(images: Tensor, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """A grid of ``images`` (n, 3, h, w) in [0, 1], with each caption below its image.

    Tiny images are enlarged to at least 128 px without smoothing. Raises ValueError if there is no image or
    no column, or if the number of captions is not that of the images.
    """
    if not len(images) or columns < 1:
        raise ValueError(f"a grid needs images and columns, not {len(images)} and {columns}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"a grid needs one caption an image, not {len(captions)} for {len(images)}")
    tiles = to_pil(images)
    columns = min(columns, len(tiles))
    factor = max(1, -(-LEAST_TILE // tiles[0].width))
    width, height = tiles[0].width * factor, tiles[0].height * factor
    font = ImageFont.load_default(FONT)
    lines = [in_lines(c, width, font) for c in captions] if captions else [[]] * len(tiles)
    below = max(len(wrapped) for wrapped in lines) * (FONT + 3) + (4 if captions else 0)
    rows = -(-len(tiles) // columns)
    size = (columns * (width + PADDING) + PADDING, rows * (height + below + PADDING) + PADDING)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (tile, wrapped) in enumerate(zip(tiles, lines, strict=True)):
        x = PADDING + (i % columns) * (width + PADDING)
        y = PADDING + (i // columns) * (height + below + PADDING)
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + height + 3), "\n".join(wrapped), "black", font, spacing=2)
    return sheet


def in_lines(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """``text`` in lines of at most ``width`` pixels, as measured in ``font``."""
    lines, line = [], ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        line = ""
        for letter in word:  # split a word that is longer than a line
            if line and font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    return [*lines, line] if line else lines
