"""What does an image file show, as RGB, or why can it not be read?

An image is returned whole or not at all. Colour profiles are not applied. Transparent pixels become white.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from posttrain.errors import DataError
from posttrain.support.quiet import exif_warnings_hidden

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""Named one by one because Pillow runs outside programs for some others (EPS, WMF)."""


class BadImage(DataError):
    """An image that cannot be used; ``reason`` is the message without the path."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def open_image(path: Path, max_pixels: int) -> Image.Image:
    """The first frame of ``path``, upright, 8-bit RGB. Raises BadImage (a DataError) if it is not whole,
    no image of :data:`FORMATS`, of more than ``max_pixels``, or of samples without a known white."""
    with _opened(path, max_pixels) as image:
        image.load()
        return _rgb(path, ImageOps.exif_transpose(image), image.format)


def image_size(path: Path, max_pixels: int) -> tuple[int, int]:
    """(width, height) of what :func:`open_image` returns, from the header where that suffices.

    Raises BadImage, but does not notice damage after the header.
    """
    with _opened(path, max_pixels) as image:
        if image.format not in ("JPEG", "MPO", "WEBP"):  # elsewhere orientation may follow the pixels
            image.load()
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """``path`` opened, and any failure inside the block turned into a BadImage."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    # Other libraries switch truncated images on for the whole process, and then they end in grey.
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        if not path.stat().st_size:
            raise BadImage(path, "the file has zero bytes")
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]
        with exif_warnings_hidden(), Image.open(path, formats=formats) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise BadImage(path, f"{size} are more than max_pixels ({max_pixels})")
            if image.format in ("JPEG", "MPO") and _ends_in_padding(path):
                raise BadImage(path, "truncated: its end is all zeros")
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(path, f"not an image (known formats: {', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's readers raise nearly every kind on damaged files
        if isinstance(error, OSError) and error.strerror:
            raise BadImage(path, error.strerror.lower()) from error
        raise BadImage(path, f"truncated or damaged: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _ends_in_padding(path: Path) -> bool:
    """Whether a JPEG was cut and filled up with zeros, as interrupted downloads are; Pillow shows grey."""
    with path.open("rb") as handle:
        handle.seek(-1, 2)
        if handle.read() != b"\0":
            return False
    return not path.read_bytes().rstrip(b"\0").endswith(b"\xff\xd9")


def _rgb(path: Path, image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.float32)
        if isinstance(clear := image.info.get("transparency"), int):
            values[values == clear] = 65535
        # Pillow's own conversion clips at 255 and shows nearly everything white.
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "floating-point numbers"
        raise BadImage(path, f"its samples are {kind}, which have no known white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
