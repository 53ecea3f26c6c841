"""Which columns, members and files are read, what is told of the rest, and what is kept between runs."""

import io
import json
import os
import tarfile

import image_layouts
import pytest
from data_files import noise, write_rows
from image_layouts import (
    COUNT,
    add,
    columns,
    name,
    png,
    with_captions,
    with_metadata,
    with_parquet,
    with_tars,
)
from PIL import Image
from toys import ToyModel

from posttrain.data import Images
from posttrain.data import index as index_module
from posttrain.data import sizes as sizes_module
from posttrain.data.family import Facts, Opening
from posttrain.data.image_data import ImageData
from posttrain.data.layouts import shards
from posttrain.data.loader import ImageSource
from posttrain.data.rows import read_records
from posttrain.errors import DataError, PosttrainError
from posttrain.support.stopping import Stopped

pytestmark = pytest.mark.usefixtures("own_caches")


def captions(folder, **settings):
    return [record.caption for record in read_records(Images(images=folder, **settings)).records]


def test_several_lines_of_a_caption_are_one_caption_and_it_is_told(tmp_path):
    with_captions(tmp_path)
    (tmp_path / f"{name(0)}.txt").write_bytes(b"\xef\xbb\xbf a red\r\n\r\n  circle \n")
    (tmp_path / "left over.txt").write_text("x")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.png").write_bytes(png(0))
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    table = read_records(Images(images=tmp_path))
    assert table.records[0].caption == "a red circle"
    assert table.rows == COUNT
    assert table.notes == [
        "1 linked subfolder not entered",
        "1 caption of several lines; the lines are joined to one caption",
        "1 .txt file without an image",
        "other files are left out: 1 .md",
    ]


def test_images_in_any_letters_and_with_points_in_their_names_find_their_captions(tmp_path):
    for stem, ending in (("a.b", ".PNG"), ("a", ".jpeg")):
        (tmp_path / f"{stem}{ending}").write_bytes(png(0))
        (tmp_path / f"{stem}.TXT").write_text(stem)
    assert captions(tmp_path) == ["a.b", "a"]


def test_a_list_names_images_below_its_own_folder_and_images_without_a_row_are_told(tmp_path):
    with_metadata(tmp_path / "one")
    with_metadata(tmp_path / "two")
    (tmp_path / "two" / "metadata.jsonl").write_text(
        "".join((tmp_path / "one" / "metadata.jsonl").read_text().splitlines(keepends=True)[:-2]) + "{\n"
    )
    table = read_records(Images(images=tmp_path, tolerance=0.1))
    assert table.layout == "2 .jsonl files"
    assert (len(table.records), table.rows, table.listed) == (2 * COUNT - 2, 2 * COUNT - 1, None)
    assert [record.id for record in table.records] == list(range(2 * COUNT - 2))
    assert table.notes == ["2 images of the folder without a row"]
    (problem,) = table.problems
    assert problem.located(tmp_path).startswith(f"{tmp_path}/two/metadata.jsonl:11: broken JSON")
    only = read_records(Images(images=tmp_path / "one" / "metadata.jsonl"))
    assert only.listed == tmp_path / "one" / "metadata.jsonl"
    assert len(only.records) == COUNT


@pytest.mark.parametrize(
    ("row", "settings", "caption"),
    [
        ({"file_name": "a.png", "text": "t", "caption": "c"}, {}, "t"),
        ({"file_name": "a.png", "prompt": "p", "description": "d"}, {}, "p"),
        ({"file_name": "a.png", "text": "t", "caption": "c"}, {"caption_column": "caption"}, "c"),
        ({"photo": "a.png", "image": 3, "caption": "c"}, {"image_column": "photo"}, "c"),
        ({"image": "a.png", "caption": "c", "german": "g"}, {"caption_column": "german"}, "g"),
        ({"file_name": "a.png", "text": {"short": "s", "long": "l"}}, {}, "l"),
    ],
)
def test_columns_are_found_by_their_usual_names_or_by_the_recipes(tmp_path, row, settings, caption):
    (tmp_path / "a.png").write_bytes(png(0))
    file = write_rows(tmp_path, [row])
    (record,) = read_records(Images(images=file, **settings)).records
    assert record.caption == caption
    used = {settings.get("image_column", "image" if "image" in row else "file_name")}
    others = {
        key: value
        for key, value in row.items()
        if key not in used and value not in (caption, row.get("text"))
    }
    assert others.items() <= record.metadata.items()


@pytest.mark.parametrize("ending", [".csv", ".CSV"])
def test_a_csv_may_name_its_images_by_a_column_of_its_own(tmp_path, ending):
    (tmp_path / "a.png").write_bytes(png(0))
    file = tmp_path / f"list{ending}"
    file.write_text('photo,german,bw,bh,weight\na.png,"ein Kreis,\n rot",8,16,0.5\n,ohne Bild,8,8,1\n')
    table = read_records(Images(images=file, image_column="photo", caption_column="german", tolerance=0.5))
    (record,) = table.records
    assert (record.caption, record.bucket, record.metadata["weight"], record.line) == (
        "ein Kreis,\n rot",
        (8, 16),
        0.5,
        2,
    )
    assert [str(problem) for problem in table.problems] == [
        "4: no 'photo' (found: 'german', 'bw', 'bh', 'weight')"
    ]
    with pytest.raises(DataError, match="one of them 'file' "):
        read_records(Images(images=file, image_column="file"))


def test_a_tars_columns_may_be_in_json_and_its_members_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/1.jpg", png(1))
        add(tar, "x/1.mask.png", png(2))
        add(tar, "x/1.json", json.dumps({"caption": "in json", "german": "g", "bw": 8, "bh": 16}).encode())
        add(tar, ".hidden", b"x")
    (record,) = read_records(Images(images=tmp_path / "a.tar")).records
    assert (record.caption, record.bucket, record.metadata["german"]) == ("in json", (8, 16), "g")
    assert str(record.image) == f"{tmp_path}/a.tar/x/1.jpg"
    assert record.image.read() == png(1)
    table = read_records(Images(images=tmp_path / "a.tar", image_column="mask.png", caption_column="german"))
    assert (table.records[0].image.read(), table.records[0].caption) == (png(2), "g")
    assert read_records(Images(images=tmp_path)).notes == [
        "members that are neither image nor caption are left out: 'mask.png'"
    ]


def test_samples_of_one_name_and_captions_of_several_lines_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for stem, caption in (("a", "one\n two\n"), ("b", "x"), ("a", "y"), ("c", "z"), ("a", "last")):
            add(tar, f"{stem}.png", png(1))
            add(tar, f"{stem}.txt", caption.encode())
    with_captions(tmp_path)
    for file in tmp_path.rglob("*.txt"):
        file.unlink()
    table = read_records(Images(images=tmp_path, tolerance=0.5))
    assert [record.caption for record in table.records] == ["one two", "x", "z"]
    assert [problem.located(tmp_path) for problem in table.problems] == [
        f"{tmp_path}/a.tar/a ({n}): a second sample of this name; members must be neighbours" for n in (2, 3)
    ]
    assert len({problem.row for problem in table.problems}) == 2
    assert table.notes == [
        "1 caption of several lines; the lines are joined to one caption",
        "12 images of the folder without a row",
    ]


def test_what_was_skipped_is_named_with_its_file_if_there_are_several(tmp_path):
    for part in "ab":
        (tmp_path / part).mkdir()
        (tmp_path / part / "good.png").write_bytes(png(0))
        good = {"file_name": "good.png", "text": "x", "bw": 8, "bh": 8}
        write_rows(tmp_path / part, [good, {**good, "file_name": "none.png"}], "metadata.jsonl")
    for place, told in ((tmp_path, f"{tmp_path}/a/metadata.jsonl:2: "), (tmp_path / "a", "2: ")):
        source = ImageData(images=place, tolerance=0.5).open(Opening(ToyModel(), tmp_path, 2))
        assert source.skipped()[0] == f"{told}no such file ({tmp_path}/a/none.png)"


def test_a_plan_downloads_no_data_set(monkeypatch):
    monkeypatch.setattr("posttrain.data.image_data.read_records", None)
    data = ImageData(images="nobody/nothing", split="train", resolution=64)
    assert data.facts("stages.sft.data") == Facts((64, 64), None, None)
    with pytest.raises(PosttrainError, match=r"a plan downloads nothing.*data\.resolution=512"):
        data.model_copy(update={"resolution": None}).facts("stages.sft.data")


def test_a_table_of_bytes_or_of_paths_and_its_other_values(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(0))
    when = datetime.datetime(2026, 1, 2, 3)
    rows = {"img": pa.array([png(1), png(2)], pa.large_binary()), "prompt": ["a", "b"], "when": [when, None]}
    rows |= {"score": [0.5, float("nan")], "thumb": [b"x", b"y"], "tags": [["t"], []]}
    pq.write_table(pa.table(rows), tmp_path / "bytes.parquet")
    table = read_records(Images(images=tmp_path / "bytes.parquet"))
    assert [record.image.read() for record in table.records] == [png(1), png(2)]
    assert table.records[0].metadata == {
        "prompt": "a",
        "when": "2026-01-02T03:00:00",
        "score": 0.5,
        "tags": ["t"],
    }
    assert table.records[1].metadata == {"prompt": "b", "when": None, "score": None, "tags": []}
    assert table.notes == ["columns of bytes are left out: 'thumb'"]
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["a"]}), tmp_path / "paths.parquet")
    table = read_records(Images(images=tmp_path / "paths.parquet", image_dir=tmp_path / "images"))
    assert table.records[0].path == tmp_path / "images" / "a.png"


@pytest.mark.parametrize("kind", ["parquet", "imagefolder"])
def test_a_folder_of_a_hub_data_set_is_read_by_its_split(tmp_path, kind):
    if kind == "parquet":
        with_parquet(tmp_path)
        (tmp_path / "README.md").write_text("# A data set\n")
    else:
        with_metadata(tmp_path / "train")
    table = read_records(Images(images=tmp_path, split="train"))
    assert [record.image.read() for record in table.records] == [png(i) for i in range(COUNT)]
    assert [r.metadata for r in table.records] == [
        {"prompt": f"caption {i}", **columns(i)} for i in range(COUNT)
    ]
    with pytest.raises(DataError, match=r"the library datasets cannot read it .*test"):
        read_records(Images(images=tmp_path, split="test"))
    with pytest.raises(DataError, match=r"the library datasets cannot read it .*other"):
        read_records(Images(images=tmp_path, split="train", subset="other"))


def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with_parquet(tmp_path)
    with pytest.raises(DataError, match=r"needs the library datasets, .*pip install 'posttrain\[data\]'"):
        read_records(Images(images=tmp_path))


def test_images_without_a_size_need_a_resolution_and_then_keep_their_shape(tmp_path):
    with_tars(tmp_path)
    with pytest.raises(DataError, match=r"no size to train at\. Give the data a 'resolution'"):
        ImageSource(Images(images=tmp_path), 8)
    source = ImageSource(Images(images=tmp_path, resolution=32), 8)
    assert {size: len(ids) for size, ids in source.buckets.items()} == {(32, 32): 8, (48, 24): 4}


@pytest.fixture
def opened(monkeypatch):
    """The images whose sizes are read, and the tars whose headers are."""
    seen = []
    read_size, read_headers = sizes_module.image_size, shards._samples
    monkeypatch.setattr(sizes_module, "image_size", lambda i, m: (seen.append(i.name), read_size(i, m))[1])
    monkeypatch.setattr(shards, "_samples", lambda f, s: (seen.append(f.name), read_headers(f, s))[1])
    monkeypatch.setattr(index_module, "LEAST", 1)
    return seen


def test_sizes_that_were_read_before_a_signal_are_not_read_again(tmp_path, opened, monkeypatch):
    with_captions(tmp_path)
    read_size = sizes_module.image_size

    def stopped(image, most):
        if len(opened) == 5:
            raise Stopped
        return read_size(image, most)

    with monkeypatch.context() as patch:
        patch.setattr(sizes_module, "image_size", stopped)
        with pytest.raises(Stopped):
            ImageSource(Images(images=tmp_path, resolution=32), 8)
    assert len(opened) == 5
    ImageSource(Images(images=tmp_path, resolution=32), 8)
    assert len(opened) == len(set(opened)) == COUNT


@pytest.mark.parametrize("make", [with_captions, with_tars, with_parquet])
def test_sizes_and_headers_are_read_once_and_anew_for_what_was_replaced(tmp_path, make, opened):
    make(tmp_path)

    def buckets():
        opened.clear()
        return ImageSource(Images(images=tmp_path, resolution=32), 8).bucket_of

    first = buckets()
    assert len([image for image in opened if "." in image]) >= COUNT
    assert buckets() == first
    assert opened == []
    if make is with_captions:
        Image.fromarray(noise(25, 60)).save(tmp_path / f"{name(3)}.png")
        changed = buckets()
        assert opened == [f"{name(3).split('/')[1]}.png"]
        assert {i for i in first if first[i] != changed[i]} == {3}
    else:
        for file in tmp_path.iterdir():
            os.utime(file, ns=(9, 9))
        assert buckets() == first
        assert len(opened) >= COUNT
    for damage in ("[", "null", '{"a": [1, "x"]}', "[3]", '[{"key": "a", "members": {"png": [0]}}]'):
        for file in (index_module.default_folder() / "images").iterdir():
            file.write_text(damage)
        assert buckets().keys() == first.keys(), "a damaged index is as none"
        assert opened


def test_an_index_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch, opened):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with_captions(tmp_path / "images")
    assert len(ImageSource(Images(images=tmp_path / "images", resolution=32), 8).records) == COUNT


def test_a_kept_size_does_not_excuse_an_image_that_is_too_large_now(tmp_path, opened):
    with_captions(tmp_path)
    ImageSource(Images(images=tmp_path, resolution=32), 8)
    source = ImageSource(Images(images=tmp_path, resolution=32, max_pixels=800, tolerance=0.5), 8)
    assert [problem.reason for problem in source.skipped] == [
        "41 x 21 pixels are more than max_pixels (800)"
    ] * 4


def test_a_part_that_is_no_longer_there_is_a_bad_image(tmp_path):
    with_tars(tmp_path)
    source = ImageSource(Images(images=tmp_path, resolution=32, tolerance=1.0), 8)
    with (tmp_path / "1.tar").open("r+b") as file:
        file.truncate(2000)
    problems = source.scan()
    assert len(problems) == COUNT - 5
    assert all("the file ends " in problem.reason for problem in problems)


def test_a_stream_of_bytes_is_what_the_file_is(tmp_path):
    with_tars(tmp_path)
    record = read_records(Images(images=tmp_path)).records[7]
    source = record.image.source()
    assert isinstance(source, io.BytesIO)
    assert source.read() == png(7) == image_layouts.png(7)
    assert (
        record.image.sha256()
        == read_records(Images(images=with_captions(tmp_path / "c"))).records[7].image.sha256()
    )
