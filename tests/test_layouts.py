"""Images are the same, in the same order and draws, however they lie: folder, list, table or archive."""

import os
from itertools import islice

import image_layouts
import pytest
import torch
from image_layouts import COUNT, EXTRA, LAYOUTS, columns, name, pixels_of, png

from posttrain.data import Images
from posttrain.data.decode import open_image
from posttrain.data.loader import ImageSource
from posttrain.data.rows import read_records
from posttrain.data.table import digest_of_rows

PACKED = ("tars", "parquet")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


pytestmark = pytest.mark.usefixtures("own_caches")


def spec_of(layout, folder, **options):
    return Images(images=LAYOUTS[layout](folder), **{"resolution": 32, **options})


def taken(source, count, batch_size=4, key=(7, 0), **where):
    return list(islice(source.batches(batch_size, key, **where), count))


def same(one, other):
    return (
        (one.step, one.epoch, one.ids, one.captions, one.bucket)
        == (other.step, other.epoch, other.ids, other.captions, other.bucket)
    ) and torch.equal(one.pixels, other.pixels)


@each_layout
def test_every_layout_yields_the_same_rows(tmp_path, layout):
    table = read_records(spec_of(layout, tmp_path))
    assert (table.rows, table.problems, table.files["count"]) == (COUNT, [], COUNT)
    assert table.files["bytes"] == sum(len(png(i)) for i in range(COUNT))
    for i, record in enumerate(table.records):
        assert (record.id, record.caption, record.bucket) == (i, f"caption {i}", None)
        assert record.image.read() == png(i)
        assert (torch.tensor(pixels_of(png(i))) == torch.tensor(pixels_of(record.image.read()))).all()
        assert open_image(record.image, 10**6).size == pixels_of(png(i)).shape[1::-1]
        assert record.metadata == {"prompt": f"caption {i}", **(columns(i) if layout in EXTRA else {})}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Batches of the images in a JSONL list."""
    return taken(ImageSource(spec_of("jsonl", tmp_path_factory.mktemp("jsonl"), flip=True), 8), 9)


@each_layout
@pytest.mark.parametrize("workers", [0, 2])
def test_every_layout_has_the_same_order_and_draws_with_workers_and_when_resumed(
    tmp_path, layout, workers, expected
):
    source = ImageSource(spec_of(layout, tmp_path, flip=True, workers=workers), 8)
    assert len(source.buckets) == 2
    assert all(map(same, expected, taken(source, 9)))
    if not workers:
        assert all(map(same, expected[5:], taken(source, 4, start_step=5)))
        alone = {(b.step, i): b.pixels[n] for b in expected for n, i in enumerate(b.ids)}
        for b in taken(source, 9, rank=1, world_size=3):
            assert all(torch.equal(alone[b.step, i], b.pixels[n]) for n, i in enumerate(b.ids))


CHANGES = {
    "size": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "time": lambda file: os.utime(file, ns=(1, 1)),
}


@each_layout
@pytest.mark.parametrize("change", CHANGES)
def test_a_replaced_file_is_noticed_and_a_copy_is_the_same(tmp_path, layout, change):
    spec, copy = spec_of(layout, tmp_path / "one"), spec_of(layout, tmp_path / "two")
    before, copied = read_records(spec), read_records(copy)
    assert before.files["sizes"] == copied.files["sizes"]
    assert digest_of_rows(before.records) == digest_of_rows(copied.records)
    if layout in PACKED and change == "size":
        return  # below
    folder = spec.images.parent if spec.images.is_file() else spec.images
    CHANGES[change](max(folder.rglob("*.*"), key=kind))
    now = read_records(spec)
    assert now.files["times"] != before.files["times"]
    assert (now.files["sizes"] != before.files["sizes"]) == (change == "size")
    assert digest_of_rows(now.records) == digest_of_rows(before.records)


@pytest.mark.parametrize("layout", PACKED)
def test_a_packed_file_with_other_images_is_read_anew(tmp_path, layout, monkeypatch):
    before = read_records(spec_of(layout, tmp_path))
    monkeypatch.setattr(image_layouts, "png", lambda i: png(i + 3))
    now = read_records(spec_of(layout, tmp_path))
    assert now.files != before.files
    assert [record.image.read() for record in now.records] == [png(i + 3) for i in range(COUNT)]


def kind(file):
    return file.suffix in (".png", ".tar", ".parquet"), file.as_posix()


def test_a_changed_caption_is_noticed_whatever_its_size_and_time(tmp_path):
    spec = spec_of("captions", tmp_path)
    before = digest_of_rows(read_records(spec).records)
    file = tmp_path / f"{name(3)}.txt"
    about = file.stat()
    file.write_text("caption X\n")
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert digest_of_rows(read_records(spec).records) != before
