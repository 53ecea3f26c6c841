"""Hides warnings of libraries that tell a user nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exif_warnings_hidden() -> Iterator[None]:
    """Hide Pillow's warnings about damaged EXIF data in the block; the pixels are read all the same.

    Changes the process's warning filters while the block runs, as warnings.catch_warnings does.
    """
    with warnings.catch_warnings():
        # Pillow reads EXIF data with its reader of TIFF files
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
        yield
