"""``posttrain check --data`` says what the images are, how long an epoch is, and what may be wrong with them."""

import io
import re

import pytest
from image_layouts import COUNT, LAYOUTS, name, png, with_captions
from rich.console import Console
from runs import HEAD, recipe, stage

from posttrain.data.lines import Problem
from posttrain.errors import DataError, RecipeError
from posttrain.planning.image_facts import kinds
from posttrain.planning.scan import scan_data

pytestmark = pytest.mark.usefixtures("own_caches")
SHAPES = "{type: shapes, images: 10, seed: 1}"


def made(data, train="{steps: 6, batch_size: 4}", head=HEAD):
    return recipe(stage("sft", train=train).replace(SHAPES, data), head=head)


def told(folder, train="{steps: 6, batch_size: 4}", options="", resolution=32):
    """What is printed, without the name of the stage and the progress."""
    text = io.StringIO()
    scan_data(
        made(f"{{images: {folder}, resolution: {resolution}{options}}}", train), Console(file=text, width=500)
    )
    lines = [line.removeprefix("sft: ") for line in text.getvalue().splitlines()]
    return [line for line in lines if "reading" not in line]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_person_wants_to_know_of_images(tmp_path, layout):
    lines = told(LAYOUTS[layout](tmp_path), "{steps: 9, batch_size: 4}")
    assert lines[0].endswith("): 12 rows, 0 of them bad")
    assert lines[2] == "12 images smaller than the size, enlarged up to 1.44 times"
    assert lines[1] == "2 sizes (width x height: images): 36 x 28: 8, 44 x 24: 4"
    assert lines[3] == (
        "an epoch is 3 steps: 3 batches of 4 images on average (batch_size 4); 9 steps are 3 epochs"
    )
    assert lines[4] == "12 different captions, of 9 to 10 characters"
    assert "tokenizer reads 16 tokens: no caption cut off, the longest has 11" in lines
    weights = [line for line in lines if "weight" in line]
    assert weights == ([] if layout == "captions" else ["12 images have a weight, from 1 to 4"])
    assert not any("warning" in line for line in lines)


def test_bad_images_are_named_and_counted_by_kind(tmp_path):
    with_captions(tmp_path)
    (tmp_path / "x.png").write_bytes(png(0)[:60])
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "y.png").write_bytes(png(0))
    (tmp_path / "z.png").write_bytes(png(1))
    lines = told(tmp_path, options=", tolerance: 0.5")
    assert [line.split(": ")[0] for line in lines[:3]] == [f"{tmp_path}/{c}.png" for c in "xyz"]
    assert lines[3] == (
        f"{tmp_path} (a folder of images with .txt files): 15 rows, 3 of them bad: 2 no caption, 1 truncated or damaged"
    )
    with pytest.raises(DataError, match=r"3 of 15 rows cannot be used, more than the tolerated 1\.0%"):
        told(tmp_path)


def test_copies_long_captions_and_notes_are_told(tmp_path):
    with_captions(tmp_path)
    for copy in "xy":
        (tmp_path / f"{copy}.png").write_bytes(png(2))
        (tmp_path / f"{copy}.txt").write_text("a red circle beside a blue square, " * 20)
    (tmp_path / "notes.md").touch()
    lines = told(tmp_path)
    first, second = f"{tmp_path}/{name(2)}.png", f"{tmp_path}/x.png"
    assert f"warning: 2 images with the bytes of another one: {first} = {second} = {tmp_path}/y.png" in lines
    assert [line for line in lines if line.startswith("tokenizer")] == [
        f"tokenizer{n} reads 16 tokens: 1 caption cut off, the longest has {tokens}"
        for n, tokens in (("", 262), ("_2", 262), ("_3", 281))
    ]
    assert "other files are left out: 1 .md" in lines


def test_images_that_are_large_enough_are_not_told(tmp_path):
    with_captions(tmp_path)
    assert "enlarged" not in " ".join(told(tmp_path, resolution=16))


def test_a_few_images_seen_very_often_are_warned_of(tmp_path):
    with_captions(tmp_path)
    (line,) = (line for line in told(tmp_path, "{steps: 60000, batch_size: 4}") if "warning" in line)
    assert (
        line
        == "warning: 12 images seen 20,000 times each: the model learns them by heart; 300 epochs are 900 train.steps"
    )
    assert not any("warning" in line for line in told(tmp_path, "{steps: 900, batch_size: 4}"))


def test_small_buckets_that_shrink_batches_are_warned_of(tmp_path):
    with_captions(tmp_path)
    lines = told(tmp_path, "{steps: 4, batch_size: 32}")
    assert (
        lines[3]
        == "an epoch is 2 steps: 2 batches of 6 images on average (batch_size 32); 4 steps are 2 epochs"
    )
    (line,) = (line for line in lines if "warning" in line)
    assert line.startswith(
        "warning: 2 of 2 batches have fewer than 32 images, since a batch has images of one size"
    )


def test_steps_that_share_a_batch_are_counted(tmp_path):
    with_captions(tmp_path)
    lines = told(tmp_path, "{steps: 6, batch_size: 4, steps_per_batch: 2}")
    assert lines[3].startswith("an epoch is 6 steps: 3 batches of 4 ")
    assert lines[3].endswith("6 steps are 1 epochs")


def test_problems_of_one_kind_are_counted_together():
    reasons = [
        "no caption: no file 'a.txt' beside it", "no caption: no file 'b.txt' beside it", "no such file",
        "9 x 9 pixels are more than max_pixels (8)", "10 x 1,000 pixels are more than max_pixels (8)",
        "not an image (known formats: JPEG, PNG)",
    ]  # fmt: skip
    problems = [Problem(n, None, reason) for n, reason in enumerate(reasons, 1)]
    shown = "2 no caption, 2 N x N pixels are more than max_pixels, 1 no such file, 1 not an image"
    assert kinds(problems) == shown


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{images: nobody/nothing}", "a data set of the hub also needs its 'split'"),
        ("{images: nobody/nothing, split: train}", None),
        ("{images: ./nobody/nothing, split: train}", None),
        ("{images: /nobody/nothing, split: train}", "no file or folder '/nobody/nothing'"),
        ("{images: nothing, split: train}", "no file or folder 'nothing'"),
        ("{images: ., resolution: 32}", None),
    ],
)
def test_the_place_of_images_must_exist_or_be_a_name_of_the_hub(data, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words is None:
        made(data)
        return
    with pytest.raises(RecipeError, match=re.escape(words)) as caught:
        made(data)
    assert "data.images" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("{images: a, subset: b}", "it has no effect without 'split'"),
        ("{images: a, split: 'train[:10%]'}", "data.split"),
        ("{images: a, split: ../b}", "data.split"),
    ],
)
def test_settings_of_a_data_set_are_checked(data, words):
    with pytest.raises(RecipeError, match=words.replace(".", r"\.")):
        made(data)


def test_every_image_was_made():
    assert COUNT == 12
