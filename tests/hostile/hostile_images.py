"""Image files that cannot be used, each with the words that say why."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(kind, image=None, **options):
    buffer = io.BytesIO()
    (image or Image.new("RGB", (32, 32), (200, 40, 40))).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width, height, depth=8, color=2):
    """A PNG whose header claims that size, with nothing behind it."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


JPEG, PNG, WEBP, BMP, GIF, TIFF = (saved(kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"))
GREY = Image.fromarray(np.zeros((4, 4), np.float32))
DAMAGED = "truncated or damaged"

# (name, content, words that the error must have)
IMAGES = [
    ("nothing", b"", "zero bytes"),
    ("one byte", b"\x89", "not an image"),
    ("zeros", bytes(4096), "not an image"),
    ("text", b"hello", "not an image"),
    ("a web page", b"<!doctype html><title>404</title>", "not an image"),
    ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    ("a pointer of git lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not an image"),
    ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    ("a pickle", b"\x80\x04cposix\nsystem\n(S'true'\ntR.", "not an image"),
    ("a zip", b"PK\x03\x04" + bytes(26), "not an image"),
    ("a PNG's head", PNG[:20], DAMAGED),
    ("half a PNG", PNG[: len(PNG) // 2], DAMAGED),
    ("a PNG with a wrong sum", PNG[:50] + b"\xff" + PNG[51:], DAMAGED),
    ("a PNG of no pixels", png_of(8, 8), DAMAGED),
    ("a PNG of 10 gigapixels", png_of(100_000, 100_000), "more than max_pixels"),
    ("a PNG of the largest sides", png_of(2**31 - 1, 2**31 - 1), "more than max_pixels"),
    ("a PNG one pixel wide and too tall", png_of(1, 2**31 - 1), "more than max_pixels"),
    ("a JPEG's head", JPEG[:100], DAMAGED),
    ("half a JPEG", JPEG[: len(JPEG) // 2 + 150], DAMAGED),
    ("a padded JPEG", JPEG[:-90] + bytes(90), "truncated"),
    ("half a WEBP", WEBP[: len(WEBP) // 2], "image"),
    ("half a BMP", BMP[: len(BMP) // 2], DAMAGED),
    ("half a TIFF", TIFF[: len(TIFF) // 2], "image"),
    ("a GIF's head", GIF[:12], "image"),
    ("floats", saved("TIFF", GREY), "floating-point numbers, whose white level is unknown"),
    (
        "32-bit numbers",
        saved("TIFF", GREY.convert("I")),
        "32-bit whole numbers, whose white level is unknown",
    ),
]
