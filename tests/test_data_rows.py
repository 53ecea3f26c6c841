"""The rows of a data file are read correctly, or refused by line; a block's type follows from its keys."""

import json

import pytest
from data_files import folder_of, noise, write_rows
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from posttrain.data import Images
from posttrain.data.image_data import ImageData, ShapesData
from posttrain.data.pair_data import PairData
from posttrain.data.prompt_data import PromptData
from posttrain.data.rows import read_records
from posttrain.errors import DataError
from posttrain.planning.image_facts import kinds
from posttrain.recipe.variants import AnyData, with_type


def test_the_type_of_a_block_follows_from_its_keys_or_is_asked_for():
    block = TypeAdapter(AnyData)
    assert isinstance(block.validate_python({"images": "a.jsonl"}), ImageData)
    assert isinstance(block.validate_python({"pairs": "a.jsonl"}), PairData)
    assert isinstance(block.validate_python({"prompts": "a.txt"}), PromptData)
    assert block.validate_python({"type": "shapes", "images": 5}) == ShapesData(images=5, seed=0)
    assert with_type({"type": "x", "images": "a"}) == {"type": "x", "images": "a"}
    for wrong in ({"images": 5}, {}, {"images": "a", "prompts": "b"}, {"images": "a", "tolerance": 1.5}, 3):
        with pytest.raises(ValidationError):
            block.validate_python(wrong)


def problems_of(folder, rows, **options):
    Image.fromarray(noise()).save(folder / "a.jpg")
    good = {"image": "a.jpg", "caption": "good"}
    table = read_records(Images(images=write_rows(folder, [good, *rows]), tolerance=1.0, **options))
    return {problem.line: problem.reason for problem in table.problems}


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
    assert table.notes == ["images that are repeated: 1 row; all are kept"]


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


def test_one_image_in_the_place_of_its_folder_is_said(tmp_path):
    (tmp_path / "a.PNG").write_bytes(b"")
    ((field, message),) = ImageData(images=tmp_path / "a.PNG").problems()
    assert field == "images"
    assert message.endswith("a.PNG' is one image: name its folder, or a list of images")
    assert [*ImageData(images=tmp_path).problems()] == []


def test_captions_that_cannot_be_read_are_counted_under_one_kind(tmp_path):
    for number in range(2):
        (tmp_path / f"img {number}.png").write_bytes(b"x")
        (tmp_path / f"img {number}.txt").write_bytes(b"\xff")
    (tmp_path / "z.png").write_bytes(b"x")
    (tmp_path / "z.txt").write_text("a circle")
    problems = read_records(Images(images=tmp_path, tolerance=1.0)).problems
    assert [p.reason for p in problems] == [
        f"caption not read: img {n}.txt: not UTF-8 at byte 1 of the file" for n in range(2)
    ]
    assert kinds(problems) == "2 caption not read"


def test_a_list_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"PAR1\0\0\1")
    (tmp_path / "utf16").write_text('{"image": "a"}', encoding="utf-16")
    (tmp_path / "blank").write_text("\n \n")
    expected = {
        "none": "no such file",
        ".": "no image in the folder and its subfolders",
        "binary": "not a text",
        "utf16": "UTF-8",
        "blank": "no rows",
    }
    for name, reason in expected.items():
        with pytest.raises(DataError, match=reason):
            read_records(Images(images=tmp_path / name))
    with pytest.raises(DataError, match="image_dir is no folder"):
        read_records(Images(images=tmp_path / "blank", image_dir=tmp_path / "none"))
