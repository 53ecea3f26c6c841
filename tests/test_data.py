"""Tests that images, captions and prompts are read correctly, or refused by name."""

import json
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile
from pydantic import TypeAdapter, ValidationError

from posttrain.data import AnyData, Images, PromptData, ShapesData, with_type
from posttrain.data.buckets import bucket_problem, bucket_sizes, cover_resize_and_crop, nearest_bucket
from posttrain.data.decode import image_size, open_image
from posttrain.data.loader import ImageSource
from posttrain.data.prompts import read_prompts
from posttrain.data.rows import read_records
from posttrain.errors import DataError
from posttrain.support.quiet import exif_warnings_hidden

LIMIT = 178_956_970


def noise(width=24, height=16, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return values[..., 0] if channels == 1 else values


def pixels(path):
    return np.asarray(open_image(path, LIMIT)).astype(int)


def write_rows(folder, rows, name="train.jsonl"):
    file = folder / name
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def folder_of(folder, count=12, **changes):
    """``count`` PNGs named .jpg in two buckets, in HY-SOAR's format."""
    rows = []
    for i in range(count):
        width, height = ((16, 16), (32, 16))[i % 3 == 2]
        Image.fromarray(noise(width + 9, height + 5, seed=i)).save(folder / f"{i}.jpg", "PNG")
        rows.append({"md5": f"{i}", "caption_en": f"caption {i}", "bw": width, "bh": height} | changes)
    return write_rows(folder, rows)


def problems_of(folder, rows, **options):
    Image.fromarray(noise()).save(folder / "a.jpg")
    good = {"image": "a.jpg", "caption": "good"}
    table = read_records(Images(images=write_rows(folder, [good, *rows]), tolerance=1.0, **options))
    return {problem.line: problem.reason for problem in table.problems}


# --- the recipe's block


def test_the_type_of_a_block_follows_from_its_keys_or_is_asked_for():
    block = TypeAdapter(AnyData)
    assert isinstance(block.validate_python({"images": "a.jsonl"}), Images)
    assert isinstance(block.validate_python({"prompts": "a.txt"}), PromptData)
    assert block.validate_python({"type": "shapes", "images": 5}) == ShapesData(images=5, seed=0)
    assert with_type({"type": "x", "images": "a"}) == {"type": "x", "images": "a"}
    for wrong in ({"images": 5}, {}, {"images": "a", "prompts": "b"}, {"images": "a", "tolerance": 1.5}, 3):
        with pytest.raises(ValidationError):
            block.validate_python(wrong)


# --- records


def test_captions_are_text_or_the_longest_text_of_a_json_object(tmp_path):
    captions = [
        json.dumps({"short": "s", "long": " ", "medium": "m"}),
        json.dumps({"text": "t", "short": ""}),
        {"long": "l", "medium": "m"},
        "{braces} are text",
        "  plain\n",
    ]
    file = folder_of(tmp_path, 5)
    rows = [
        json.loads(row) | {"caption_en": c}
        for row, c in zip(file.read_text().split("\n"), captions, strict=False)
    ]
    records = read_records(Images(images=write_rows(tmp_path, rows))).records
    assert [r.caption for r in records] == ["m", "t", "l", "{braces} are text", "plain"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"image": "a.jpg", ', "broken JSON"),
        ('["a.jpg", "x"]', "not a JSON object but list"),
        ("[" * 100_000, "broken JSON"),
        ({"caption": "x"}, "no 'image' (found: 'caption')"),
        ({"image": "a.jpg"}, "no 'caption' (found: 'image')"),
        ({"image": "a.jpg", "caption_en": "x"}, "no 'caption'"),
        ({"image": 3, "caption": "x"}, "'image' must be text, not 3"),
        ({"image": "a.jpg", "caption": None}, "'caption' must be text, not null"),
        ({"image": "a.jpg", "caption": " \n"}, "'caption' is empty"),
        ({"image": "a.jpg", "caption": "\ud800"}, "surrogate"),
        ({"image": "a.jpg", "caption": '{"long": "a cat'}, "starts like a JSON object"),
        ({"image": "a.jpg", "caption": '{"longest": "a cat"}'}, "long, medium, short, text"),
        ({"image": "../a.jpg", "caption": "x"}, "must not leave"),
        ({"image": "a\0.jpg", "caption": "x"}, "must not leave"),
        ({"image": "b.jpg", "caption": "x"}, "no such file"),
        ({"image": "empty.jpg", "caption": "x"}, "zero bytes"),
        ({"image": "sub", "caption": "x"}, "not a file"),
        ({"image": "a" * 5000, "caption": "x"}, "file name too long"),
        ({"md5": "a", "caption_en": "x"}, "'md5' in a file whose rows name their images by 'image'"),
        ({"image": "a.jpg", "md5": "a", "caption": "x"}, "'md5' in a file"),
        ({"image": "a.jpg", "caption": "x", "bw": 512}, "'bh' must be a positive whole number, not null"),
        (
            {"image": "a.jpg", "caption": "x", "bw": True, "bh": 8},
            "'bw' must be a positive whole number, not true",
        ),
        ({"image": "a.jpg", "caption": "x", "bw": 512.0, "bh": -8}, "'bw' must be"),
    ],
)
def test_a_bad_row_is_named_by_line_and_reason_and_the_others_stay(tmp_path, row, reason):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "sub").mkdir()
    problems = problems_of(tmp_path, ["", row])
    assert list(problems) == [3]
    assert reason in problems[3]


def test_ids_count_all_rows_and_bom_crlf_and_blank_lines_do_no_harm(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.jpg")
    row = b'{"image": "%s", "caption": "\xc3\xa9"}'
    absolute = row % bytes(tmp_path / "a.jpg")
    body = b"\r\n\r\n".join([b"\xef\xbb\xbf" + row % b"a.jpg", b"{", b'{"image": "\xff"}', absolute])
    (tmp_path / "train.jsonl").write_bytes(body)
    table = read_records(Images(images=tmp_path / "train.jsonl", tolerance=0.5))
    assert [(r.id, r.line, r.caption) for r in table.records] == [(0, 1, "é"), (3, 7, "é")]
    assert [p.line for p in table.problems] == [3, 5]
    assert "not UTF-8" in table.problems[1].reason
    assert table.notes == ["1 rows repeat an image; all are kept"]


def test_md5_names_a_file_of_image_dir_and_cannot_leave_it(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(noise()).save(tmp_path / "images" / "a.jpg")
    rows = [{"md5": "a", "caption_en": "x"}, {"md5": "../a", "caption_en": "x"}]
    spec = Images(images=write_rows(tmp_path, rows), image_dir=tmp_path / "images", tolerance=0.5)
    table = read_records(spec)
    assert [r.path for r in table.records] == [tmp_path / "images" / "a.jpg"]
    assert "'md5' must be a file name" in table.problems[0].reason


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_one_problem_more_than_tolerated_stops(tmp_path, bad, stops):
    Image.fromarray(noise()).save(tmp_path / "a.jpg")
    rows = [{"image": "a.jpg", "caption": "x"}] * (100 - bad) + [{"image": "b.jpg", "caption": "x"}] * bad
    spec = Images(images=write_rows(tmp_path, rows))
    if not stops:
        assert len(read_records(spec).problems) == 1
        return
    with pytest.raises(DataError) as caught:
        read_records(spec)
    message = str(caught.value)
    assert "2 of 100 rows cannot be used (allowed: 1, by tolerance 0.01)" in message
    assert f"{spec.images}:99: no such file" in message
    assert "raise 'tolerance'" in message


def test_a_long_list_of_problems_shows_ten_and_counts_the_rest(tmp_path):
    rows = [{"image": "none.jpg", "caption": "x"}] * 15
    with pytest.raises(DataError) as caught:
        read_records(Images(images=write_rows(tmp_path, rows), tolerance=1.0))
    assert str(caught.value).count("no such file") == 10
    assert "and 5 more" in str(caught.value)
    assert "none is left" in str(caught.value)


def test_a_list_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"PAR1\0\0\1")
    (tmp_path / "utf16").write_text('{"image": "a"}', encoding="utf-16")
    (tmp_path / "blank").write_text("\n \n")
    expected = {
        "none": "no such file",
        ".": "is a directory",
        "binary": "not a text",
        "utf16": "UTF-8",
        "blank": "no rows",
    }
    for name, reason in expected.items():
        with pytest.raises(DataError, match=reason):
            read_records(Images(images=tmp_path / name))
    with pytest.raises(DataError, match="image_dir is no folder"):
        read_records(Images(images=tmp_path / "blank", image_dir=tmp_path / "none"))


# --- decoding


def test_grey_of_16_bits_is_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    for suffix in ("png", "tif", "pgm"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        assert pixels(tmp_path / f"a.{suffix}")[0, :, 1].tolist() == [0, 0, 1, 128, 255]


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


# --- buckets


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 32))
@example(64, 16)
def test_buckets_are_legal_near_in_area_and_symmetric(factor, divisor):
    resolution = factor * divisor
    sizes = bucket_sizes(resolution, divisor)
    assert (resolution, resolution) in sizes
    for width, height in sizes:
        assert width % divisor == height % divisor == 0
        assert 0.5 <= width / height <= 2
        assert (height, width) in sizes
        assert abs(width * height - resolution**2) <= divisor * max(width, height) / 2
        # each size is its own nearest bucket, so an image of that size is not resampled
        assert nearest_bucket(width, height, sizes) == (width, height)


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000))
@example(1, 1000)
def test_no_bucket_has_a_nearer_aspect_ratio(width, height):
    sizes = bucket_sizes(512, 16)
    chosen = nearest_bucket(width, height, sizes)
    distances = {size: abs(np.log(width / height * size[1] / size[0])) for size in sizes}
    assert distances[chosen] <= min(distances.values()) + 1e-9


def test_buckets_that_cannot_be_are_refused_with_the_nearest_that_can(tmp_path):
    assert bucket_problem((512, 768), 16, LIMIT) is None
    assert (
        bucket_problem((500, 512), 16, LIMIT) == "bw 500 is not a multiple of 16; the nearest is 496 or 512"
    )
    assert "nearest is 16" in str(bucket_problem((512, 9), 16, LIMIT))
    assert "max_pixels" in str(bucket_problem((512, 512), 16, 10_000))
    with pytest.raises(DataError, match="resolution 8 is below 16"):
        bucket_sizes(8, 16)
    with pytest.raises(DataError, match="bw 20 is not a multiple of 16; the nearest is 16 or 32"):
        ImageSource(Images(images=folder_of(tmp_path, bw=20)), 16)
    with pytest.raises(DataError, match="'resolution'"):
        ImageSource(Images(images=folder_of(tmp_path, bw=None, bh=None)), 16)


def test_a_crop_without_resizing_is_exact_and_reaches_every_position():
    values = noise(20, 16)
    image = Image.fromarray(values)
    seen = set()
    for k in range(50):
        crop = cover_resize_and_crop(image, (16, 16), (k / 50, 0.99), False)
        back = ((crop + 1) * 127.5).round().permute(1, 2, 0).numpy()
        start = next(s for s in range(5) if np.array_equal(back, values[:, s : s + 16]))
        seen.add(start)
    assert seen == set(range(5))
    centre = cover_resize_and_crop(image, (16, 16), (0.5, 0.5), True)
    expected = torch.tensor(values[:, 2:18][:, ::-1].copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(centre, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from([(16, 16), (32, 16), (16, 48)]),
    st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
@example((1, 1000), (512, 512), (0.999999, 0.999999))
@example((7919, 3), (16, 48), (0.999999, 0.5))
def test_any_image_covers_any_bucket(size, bucket, offsets):
    crop = cover_resize_and_crop(Image.new("RGB", size, (255, 0, 51)), bucket, offsets, False)
    assert crop.shape == (3, bucket[1], bucket[0])
    assert crop.dtype == torch.float32
    assert torch.allclose(crop, torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand_as(crop))


def test_the_last_position_is_reached_where_rounding_falls_short_of_a_whole_pixel():
    assert 98 * (16 / 49) < 32
    image = Image.new("RGB", (98, 49))
    image.paste((255, 255, 255), (95, 0, 98, 49))
    assert cover_resize_and_crop(image, (16, 16), (0.999, 0.0), False)[:, :, -1].min() > 0.8


def test_resizing_and_cropping_at_once_is_covering_then_cropping():
    image = Image.fromarray(noise(90, 60))
    whole = np.asarray(image.resize((48, 32), Image.Resampling.LANCZOS))
    for k, offset in ((0, 0.0), (8, 0.5), (16, 0.99)):
        crop = (cover_resize_and_crop(image, (32, 32), (offset, 0.0), False) + 1) * 127.5
        assert np.abs(crop.permute(1, 2, 0).numpy() - whole[:, k : k + 32]).max() <= 1.01


# --- batches


def taken(source, count, batch_size=4, key=(7, 0), **where):
    return list(islice(source.batches(batch_size, key, **where), count))


def same(one, other):
    return (
        (one.step, one.epoch, one.ids, one.captions, one.bucket)
        == (other.step, other.epoch, other.ids, other.captions, other.bucket)
    ) and torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_epoch_shows_each_image_once_over_all_ranks(tmp_path, world_size, workers):
    source = ImageSource(Images(images=folder_of(tmp_path), workers=workers), 16)
    steps = source.batches_per_epoch(3)
    assert steps == 5
    ranks = range(world_size) if not workers else (0, world_size - 1)
    parts = {rank: taken(source, steps + 1, 3, rank=rank, world_size=world_size) for rank in set(ranks)}
    for batches in parts.values():
        assert [b.step for b in batches] == list(range(steps + 1))
        assert [b.epoch for b in batches] == [0] * steps + [1]
        for b in batches:
            assert b.pixels.shape == (len(b.ids), 3, b.bucket[1], b.bucket[0])
            assert b.captions == [f"caption {i}" for i in b.ids]
    seen = sorted(i for batches in parts.values() for b in batches[:steps] for i in b.ids)
    assert len(set(seen)) == len(seen)
    if len(parts) == world_size:
        assert seen == list(range(12))


def test_workers_resume_and_ranks_do_not_change_a_pixel(tmp_path):
    options = {"images": folder_of(tmp_path), "flip": True}
    source = ImageSource(Images(**options), 16)
    whole = taken(source, 9)
    state = torch.get_rng_state()
    assert all(map(same, whole, taken(ImageSource(Images(**options, workers=2), 16), 9)))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(same, whole[5:], taken(source, 4, start_step=5)))
    alone = {(b.step, i): b.pixels[n] for b in whole for n, i in enumerate(b.ids)}
    for rank in range(3):
        for b in taken(source, 9, rank=rank, world_size=3):
            assert all(torch.equal(alone[b.step, i], b.pixels[n]) for n, i in enumerate(b.ids))


def test_crops_and_flips_are_drawn_anew_each_epoch_and_only_if_asked_for(tmp_path):
    def first_image(**options):
        batches = taken(ImageSource(Images(images=folder_of(tmp_path), **options), 16), 5 * 20, 3)
        return [b.pixels[b.ids.index(0)] for b in batches if 0 in b.ids]

    def kinds(images):
        return len({image.numpy().tobytes() for image in images})

    assert kinds(first_image(crop="center")) == 1
    assert kinds(first_image(crop="center", flip=True)) == 2
    assert kinds(first_image(crop="random")) > 2


def test_images_are_flipped_independently_of_each_other(tmp_path):
    file = folder_of(tmp_path)
    plain, flipped = (
        taken(ImageSource(Images(images=file, crop="center", flip=flip), 16), 1, 8)[0].pixels
        for flip in (False, True)
    )
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(plain, flipped, strict=True)]
    assert all(torch.equal(a, b) != m for a, b, m in zip(plain, flipped, mirrored, strict=True))
    assert len(set(mirrored)) == 2


def test_resolution_overrides_the_sizes_of_the_rows_but_keeps_their_shape(tmp_path):
    source = ImageSource(Images(images=folder_of(tmp_path), resolution=32), 8)
    assert set(source.buckets) == {(32, 32), (48, 24)}
    wide = ImageSource(Images(images=folder_of(tmp_path, bw=32, bh=16), resolution=32), 8)
    assert set(wide.buckets) == {(48, 24)}  # as the rows say, whatever the files are
    Image.new("RGB", (60, 30)).save(tmp_path / "wide.png")
    file = write_rows(tmp_path, [{"image": "wide.png", "caption": "x"}], "plain.jsonl")
    assert set(ImageSource(Images(images=file, resolution=32), 8).buckets) == {(48, 24)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_left_out_named_once_and_never_replaced(tmp_path, workers):
    file = folder_of(tmp_path)
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:300])
    source = ImageSource(Images(images=file, tolerance=0.1, workers=workers), 16)
    batches = taken(source, 12, 1)
    assert [i for b in batches[:11] for i in b.ids].count(3) == 0
    assert sorted(i for b in batches[:11] for i in b.ids) == [0, 1, 2, *range(4, 12)]
    assert [b.step for b in batches if b.epoch == 0] == sorted(set(range(12)) - missing_step(source))
    assert [(p.line, p.path) for p in source.skipped] == [(4, tmp_path / "3.jpg")]
    (empty,) = [b for b in taken(source, 12, 1, world_size=2) if b.step in missing_step(source)]
    assert empty.pixels.shape == (0, 3, 16, 16)
    with pytest.raises(DataError, match=r"train.jsonl:4: truncated"):
        ImageSource(Images(images=file, workers=workers), 16)


def missing_step(source):
    from posttrain.data.order import epoch_batches

    return {step for step, ids in enumerate(epoch_batches(source.buckets, 1, (7, 0), 0)) if ids == [3]}


def test_too_many_images_damaged_during_the_run_stop_it(tmp_path):
    source = ImageSource(Images(images=folder_of(tmp_path), tolerance=0.2), 16)
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"3 of 12 rows cannot be used \(allowed: 2"):
        taken(source, 20)
    assert len(source.skipped) == 3


def test_a_damaged_folder_stops_the_run_at_its_start_and_a_scan_lists_every_problem(tmp_path):
    rows = [json.loads(row) for row in folder_of(tmp_path).read_text().splitlines()]
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_text("not an image")
    file = write_rows(tmp_path, [*rows, *rows * 40, "{"])
    with pytest.raises(DataError, match=r"\d+ of 64 images tried cannot be decoded"):
        ImageSource(Images(images=file), 16)
    progress = []
    problems = ImageSource(Images(images=file, tolerance=1.0), 16).scan(lambda *at: progress.append(at))
    assert [p.line for p in problems] == sorted({*(12 * k + i for k in range(41) for i in range(1, 5)), 493})
    assert progress[-1] == (492, 492)


def test_all_images_bad_is_an_error_even_where_all_may_be_skipped(tmp_path):
    file = folder_of(tmp_path, 3)
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_text("not an image")
    with pytest.raises(DataError, match="none is left"):
        ImageSource(Images(images=file, tolerance=1.0), 16)


def test_a_rank_outside_the_world_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rank"):
        taken(ImageSource(Images(images=folder_of(tmp_path)), 16), 1, rank=2, world_size=2)


# --- prompts


def test_prompts_are_lines_or_objects_and_repetitions_stay(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa cat \r\n\r\n{a} dog\r\na cat".encode())
    assert read_prompts(tmp_path / "a.txt") == [{"prompt": p} for p in ("a cat", "{a} dog", "a cat")]
    rows = [{"prompt": "a cat", "tag": "counting", "include": [{"class": "cat", "count": 1}]}] * 2
    assert read_prompts(write_rows(tmp_path, rows)) == rows


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"text": "y"}', r"a.jsonl:3: no 'prompt' \(found: 'text'\)"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ""}', "a.jsonl:2: 'prompt' is empty"),
        ("a.jsonl", "a cat", "a.jsonl:1: broken JSON"),
        ("a.txt", 'x\n{"prompt": "x"}', "a.txt:2: a JSON object in a text file"),
        ("a.txt", "x\n\xff", "a.txt:2: not UTF-8"),
        ("a.txt", " \n", "no prompt"),
    ],
)
def test_a_bad_prompt_is_named_by_line(tmp_path, name, body, reason):
    (tmp_path / name).write_bytes(body.encode("latin-1"))
    with pytest.raises(DataError, match=reason):
        read_prompts(tmp_path / name)


def test_a_prompt_file_that_is_none_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(DataError, match=r"directory|no such file"):
            read_prompts(path)
