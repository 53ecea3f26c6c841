"""Image files are decoded as they are shown, or refused by name."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from data_files import LIMIT, noise, pixels
from PIL import ExifTags, Image, ImageFile
from PIL.PngImagePlugin import PngImageFile

from posttrain.data.decode import image_size, open_image
from posttrain.errors import DataError
from posttrain.support.quiet import exif_warnings_hidden


def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    for suffix in ("png", "tif", "pgm"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        assert pixels(tmp_path / f"a.{suffix}")[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def tiff(bits, photometric, packed):
    """A TIFF of one row of two grey pixels, whose bytes are ``packed``."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(packed))
        + packed
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


def test_grey_of_a_tiff_runs_from_its_own_black_to_its_own_white(tmp_path):
    for name, image, expected in (
        ("12 bits", tiff(12, 1, b"\xff\xf0\x80"), [255, 8]),  # 4095 and 128
        ("16 bits", tiff(16, 1, b"\xff\xff\x01\x01"), [255, 1]),
        ("white is zero", tiff(16, 0, b"\xff\xff\x01\x01"), [0, 254]),
    ):
        (tmp_path / f"{name}.tif").write_bytes(image)
        assert pixels(tmp_path / f"{name}.tif")[0, :, 0].tolist() == expected, name


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90)],
)
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path, suffix, orientation, turn):
    image = Image.new("RGB", (24, 16), (200, 30, 30))
    image.paste((20, 20, 220), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif, lossless=True, quality=95, subsampling=0)
    expected = np.asarray(image.transpose(turn)).astype(int)
    got = pixels(tmp_path / f"a.{suffix}")
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 6
    assert image_size(tmp_path / f"a.{suffix}", LIMIT) == (expected.shape[1], expected.shape[0])


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def exif_of(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
RAW = b"Raw profile type exif\0\nexif\n%8d\n" % len(exif_of(8)) + exif_of(8).hex().encode() + b"\n"


@pytest.mark.parametrize(
    ("kind", "data", "turned"),
    [
        (b"eXIf", exif_of(3), False),
        (b"eXIf", exif_of(6), True),
        (b"iTXt", XMP, True),
        (b"tEXt", RAW, True),
        (b"tEXt", b"date:create\x002026-11-28", False),
        (b"tEXt", b"", False),
    ],
)
@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_a_png_is_measured_as_it_is_shown_wherever_it_says_that_it_is_turned(
    tmp_path, kind, data, turned, place
):
    path = tmp_path / "a.png"
    Image.fromarray(noise(24, 16)).save(path)
    saved = path.read_bytes()
    at = saved.index(place) - 4
    path.write_bytes(saved[:at] + chunk(kind, data) + saved[at:])
    assert image_size(path, LIMIT) == open_image(path, LIMIT).size == ((16, 24) if turned else (24, 16))


def test_a_png_is_measured_without_decoding_its_pixels(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(noise(300, 200)).save(path)
    saved = path.read_bytes()
    text = chunk(b"tEXt", b"date:create\x002026-11-28")
    path.write_bytes(saved[:-12] + text + saved[-12:])  # as ImageMagick writes it
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(path, LIMIT) == (300, 200)
    monkeypatch.undo()
    path.write_bytes(saved[: len(saved) // 2])
    with pytest.raises(DataError, match=r"a\.png: truncated"):
        image_size(path, LIMIT)


def test_transparency_becomes_white_in_every_mode(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 128], [9, 9, 9, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert pixels(tmp_path / "rgba.png").tolist() == [[[255, 0, 0], [255, 127, 127], [255, 255, 255]]]
    Image.fromarray(rgba[..., [0, 3]], "LA").save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png")[0, :, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png")
    assert pixels(tmp_path / "p.png").tolist() == [[[0, 0, 0], [10, 200, 30]]]
    palette.save(tmp_path / "clear.png", transparency=0)
    assert pixels(tmp_path / "clear.png").tolist() == [[[255, 255, 255], [10, 200, 30]]]
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "rgb.png").tolist() == [[[255, 255, 255]]]
    Image.fromarray(np.array([[7, 257]], np.uint16)).save(tmp_path / "i16.png", transparency=7)
    assert pixels(tmp_path / "i16.png")[0, :, 0].tolist() == [255, 1]


def test_bilevel_lab_cmyk_and_the_first_frame_are_shown_right(tmp_path):
    Image.new("LAB", (4, 4), (255, 128, 128)).save(tmp_path / "lab.tif")
    assert pixels(tmp_path / "lab.tif").min() > 250
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "one.png")
    assert pixels(tmp_path / "one.png")[0, :, 2].tolist() == [255, 0]
    for suffix in ("jpg", "tif"):  # Pillow writes, like Adobe, inverted CMYK JPEGs
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / f"cmyk.{suffix}", quality=100)
        assert np.abs(pixels(tmp_path / f"cmyk.{suffix}") - [255, 0, 0]).max() < 8
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "a.gif")[0, 0].tolist() == [250, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif", "ppm", "jp2"])
@pytest.mark.parametrize("lenient", [False, True])
def test_a_cut_file_is_an_error_whatever_other_libraries_switched_on(tmp_path, suffix, lenient, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(64, 48)).save(path)
    data = path.read_bytes()
    for part in (0.1, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(DataError, match=r"a\.\w+: (truncated|not an image)"):
            open_image(path, LIMIT)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


def test_what_cannot_be_shown_is_refused_by_name(tmp_path):
    Image.fromarray(noise(64, 48)).save(tmp_path / "padded.jpg")
    data = (tmp_path / "padded.jpg").read_bytes()
    (tmp_path / "padded.jpg").write_bytes(data[:-900] + b"\0" * 900)
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "text.jpg").write_text("<html>404</html>" * 9)
    (tmp_path / "eps.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    Image.fromarray(np.ones((4, 4), np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    Image.new("1", (4000, 4000)).save(tmp_path / "bomb.png")
    expected = {
        "padded.jpg": "truncated: its end is all zeros",
        "zero.jpg": "zero bytes",
        "text.jpg": "not an image",
        "eps.jpg": "not an image",
        "i.tif": "32-bit",
        "f.tif": "floating-point",
        "bomb.png": "4000 x 4000 pixels are more than max_pixels",
        "none.png": "no such file",
        ".": "is a directory",
    }
    for name, reason in expected.items():
        with pytest.raises(DataError, match=reason) as caught:
            open_image(tmp_path / name, 1_000_000)
        assert str(tmp_path / name) in str(caught.value)


def test_damaged_exif_data_is_no_news_and_other_warnings_are(tmp_path):
    image = Image.fromarray(noise())
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "a description of some length"
    image.save(tmp_path / "a.jpg", exif=exif.tobytes()[:-5])
    with pytest.warns(UserWarning, match="Truncated File Read"), Image.open(tmp_path / "a.jpg") as opened:
        opened.getexif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.jpg", LIMIT).size == image_size(tmp_path / "a.jpg", LIMIT) == (24, 16)
        with exif_warnings_hidden(), pytest.raises(UserWarning, match="another"):
            warnings.warn("another", UserWarning, stacklevel=1)


def test_max_pixels_alone_decides_and_pillow_does_not_warn(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "a.png", 100).size == (10, 10)
        with pytest.raises(DataError, match="max_pixels"):
            image_size(tmp_path / "a.png", 99)
    assert Image.MAX_IMAGE_PIXELS == 4
