"""Turns image files into data URLs, so small that a page with many images still loads fast."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from posttrain.errors import DamagedError

TINY_PIXELS = 96
"""Images up to this width are stored unchanged, and the page enlarges them without smoothing."""
STORED_PIXELS = 512
"""No side of a stored image has more pixels, where the page has few images."""
LEAST_PIXELS = 192
"""Images are not made smaller than this, however many there are."""
FEW = 60
"""So many images are stored in full; more are made smaller, so that all together take no more bytes."""


def stored_side(images: int) -> int:
    """The largest side, in pixels, of each of so many images."""
    return max(LEAST_PIXELS, min(STORED_PIXELS, round(STORED_PIXELS * (FEW / max(images, 1)) ** 0.5)))


def data_url(path: Path, side: int = STORED_PIXELS) -> tuple[str, bool]:
    """An image file as a data URL, with no side above ``side`` pixels, and whether it is tiny.

    Tiny PNG files stay as they are; all others become JPEG. Raises DamagedError.
    """
    try:
        with Image.open(path) as image:
            image.load()  # a torn file fails here, whatever is stored of it
            if image.format == "PNG" and max(image.size) <= TINY_PIXELS:
                return _url("png", path.read_bytes()), True
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=85)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of a broken PNG
        raise DamagedError(f"{str(path)!r} is damaged: {error}") from error
    return _url("jpeg", buffer.getvalue()), False


def _url(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
