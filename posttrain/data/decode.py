"""Reads image files as upright 8-bit RGB, or says why a file cannot be used.

A truncated image is refused. Colour profiles are not applied. Transparent pixels become white.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from posttrain.data.place import Place
from posttrain.errors import DataError
from posttrain.support.quiet import exif_warnings_hidden

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""The formats that are read. Pillow would run external programs for some others (EPS, WMF)."""

ORIENTED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""How the texts in a PNG begin that may say its orientation, as its chunk eXIf may."""
WHITE_IS_ZERO = 0
"""The photometric interpretation of a TIFF whose grey runs from white to black."""


class BadImage(DataError):
    """An image cannot be used. ``reason`` is the message without the path."""

    def __init__(self, path: Path | Place, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def open_image(path: Path | Place, max_pixels: int) -> Image.Image:
    """The first frame of ``path``, upright, as 8-bit RGB.

    Raises BadImage (a DataError) if the file is truncated or damaged, is no image of :data:`FORMATS`, has
    more than ``max_pixels`` pixels, or has samples whose white level is unknown.
    """
    with _opened(path, max_pixels) as image:
        image.load()
        return _rgb(path, image)


def image_size(path: Path | Place, max_pixels: int) -> tuple[int, int]:
    """(width, height) of the image that :func:`open_image` returns, read from the header where possible.

    Raises BadImage, but does not detect damage after the header.
    """
    with _opened(path, max_pixels) as image:
        if image.format == "PNG":
            in_header = not _turned_after_pixels(image)
        else:
            in_header = image.format in ("JPEG", "MPO", "WEBP")
        if not in_header:
            image.load()
        width, height = image.size
        exif = Image.Image.getexif(image)  # that of a PNG would decode the pixels
        turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def _turned_after_pixels(image: Image.Image) -> bool:
    """Whether a PNG may say its orientation after its pixels, or ends before it could."""
    file = image.fp if isinstance(image, ImageFile.ImageFile) else None
    assert file is not None, "the image is open"
    here = file.tell()
    try:
        file.seek(8)
        after = False
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"IEND":
                return False
            begin = file.read(min(length, max(map(len, ORIENTED)))) if after else b""
            if after and (kind == b"eXIf" or (kind != b"IDAT" and begin.startswith(ORIENTED))):
                return True
            after = after or kind == b"IDAT"
            file.seek(length - len(begin) + 4, 1)  # and its check sum
        return True
    finally:
        file.seek(here)


@contextmanager
def _opened(path: Path | Place, max_pixels: int) -> Iterator[Image.Image]:
    """Open ``path``; every failure inside the block becomes a BadImage."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    # Other libraries allow truncated images for the whole process; Pillow then fills the rest with grey.
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        source = path.source() if isinstance(path, Place) else path
        if isinstance(source, Path) and not source.stat().st_size:
            raise BadImage(path, "the file has zero bytes")
        Image.init()
        formats = [name for name in FORMATS if name in Image.OPEN]
        with exif_warnings_hidden(), Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height} pixels"
                raise BadImage(path, f"{size} are more than max_pixels ({max_pixels})")
            if image.format in ("JPEG", "MPO") and _ends_in_padding(source):
                raise BadImage(path, "truncated: its end is all zeros")
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(path, f"not an image (known formats: {', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow raises nearly every exception type on damaged files
        if isinstance(error, OSError) and error.strerror:
            raise BadImage(path, error.strerror.lower()) from error
        raise BadImage(path, f"truncated or damaged: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _ends_in_padding(source: Path | BytesIO) -> bool:
    """Whether a JPEG ends in zeros, as interrupted downloads do. Pillow would show its lost part as grey."""
    with source.open("rb") if isinstance(source, Path) else BytesIO(source.getbuffer()) as handle:
        handle.seek(-1, 2)
        if handle.read() != b"\0":
            return False
        handle.seek(0)
        return not handle.read().rstrip(b"\0").endswith(b"\xff\xd9")


def _rgb(path: Path | Place, opened: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
        black, white = _levels(opened)
        values = np.asarray(image).astype(np.float32)
        if isinstance(clear := image.info.get("transparency"), int):
            values[values == clear] = white
        # Pillow's conversion clips at 255, so nearly everything would be white.
        values = (values - black) / ((white - black) / 255)
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "floating-point numbers"
        message = f"its samples are {kind}, whose white level is unknown; save it with 8 or 16 bits"
        raise BadImage(path, message)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _levels(opened: Image.Image) -> tuple[int, int]:
    """The values of black and white in grey of up to 16 bits, which Pillow reads as a file has them."""
    if not isinstance(opened, TiffImageFile):
        return 0, 65535
    most = 2 ** opened.tag_v2[BITSPERSAMPLE][0] - 1
    return (most, 0) if opened.tag_v2[PHOTOMETRIC_INTERPRETATION] == WHITE_IS_ZERO else (0, most)
