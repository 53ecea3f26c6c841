"""Image files get the prompts that are theirs, and the files that scores are written to say what is wrong."""

import json

import pytest
from PIL import ExifTags, Image
from typer.testing import CliRunner

from posttrain.cli.app import app
from posttrain.errors import DataError, PosttrainError, RewardError
from posttrain.scoring.conformance import read
from posttrain.scoring.folder import image_files, with_prompts
from posttrain.support.images import save_image


@pytest.fixture
def folder(tmp_path):
    """A folder, and a function that fills it with images of these names and writes as many prompts."""

    def filled(*names):
        (tmp_path / "images").mkdir()
        for name in names:
            Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
        (tmp_path / "p.txt").write_text("".join(f"prompt {n}\n" for n in range(len(names))))
        return image_files([tmp_path / "images"]), tmp_path / "p.txt"

    return filled


@pytest.mark.parametrize("ten", ["10.png", "10.jpg"])
def test_numbers_of_unlike_length_would_get_each_others_prompts(folder, ten):
    images, prompts = folder("0.png", "1.png", "2.png", ten)
    with pytest.raises(DataError, match=rf"p\.txt: .* '{ten}' comes before '2\.png': number the files"):
        with_prompts(images, prompts, None)
    assert len(with_prompts(images, None, "one prompt")) == 4
    prompts = prompts.with_suffix(".jsonl")
    rows = [{"prompt": image.stem, "image": image.name} for image in images[::-1]]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert all(image.stem == row["prompt"] for image, row in with_prompts(images, prompts, None))


def test_other_orders_are_those_of_the_names(folder):
    names = ["00001-2-cats-0.png", "00002-10-cats-0.png", "a12b.png", "a1c.png", "x.png"]
    images, prompts = folder(*names)
    assert [image.name for image, _ in with_prompts(images, prompts, None)] == names
    given = images[::-1]  # named one by one on the command line
    assert [image for image, _ in with_prompts(given, prompts, None)] == given


def test_hidden_files_are_no_images_of_the_folder(folder, tmp_path):
    images, _ = folder("a.png")
    (tmp_path / "images" / "._a.png").write_bytes(b"what a Mac keeps beside a file")
    assert image_files([tmp_path / "images"]) == images


@pytest.mark.parametrize(("output", "reason"), [("p.txt/s.jsonl", "is a file"), ("images", "it is a folder")])
def test_a_file_of_scores_that_cannot_be_written_is_told_before_an_image_is_read(
    folder, tmp_path, output, reason
):
    images, _ = folder("a.png")
    images[0].write_bytes(b"no image")
    arguments = [str(images[0]), "--prompt", "a", "--reward", "jpeg_compressibility"]
    arguments += ["--output", str(tmp_path / output)]
    with pytest.raises(PosttrainError, match=rf"cannot write .*{output}'.*{reason}"):
        CliRunner().invoke(app, ["score", *arguments], catch_exceptions=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "p.txt"]


@pytest.mark.parametrize("change", [{"index": "0"}, {"score": None}, {"details": []}, {"image": 1}])
def test_a_case_of_a_conformance_file_that_was_changed_is_named(tmp_path, change):
    case = {"index": 0, "prompt": "a", "image": "b", "score": 1, "details": {}}
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"format": 1, "cases": [case]}))
    assert read(file)["cases"] == [case]
    file.write_text(json.dumps({"format": 1, "cases": [case, {**case, **change}]}))
    with pytest.raises(
        RewardError, match=r"c\.json: case 2 is not as it was written: it needs index, prompt"
    ):
        read(file)


def test_a_jpeg_has_the_beginning_of_a_prompt_that_is_too_long_for_it(tmp_path):
    record = {"prompt": "\U0001f408" * 20_000, "index": 0, "tag": None, "scores": {"s": 1.0}}
    file = save_image(Image.new("RGB", (8, 8)), tmp_path, 0, record, "jpeg")
    with Image.open(file) as image:
        kept = json.loads(image.getexif()[ExifTags.Base.ImageDescription])
    assert kept == {**record, "prompt": "\U0001f408" * 5000}
    assert len(list(tmp_path.iterdir())) == 1
