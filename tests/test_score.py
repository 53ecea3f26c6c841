"""Images on disk are scored as in a run, with their own prompts, and the shipped scores reproduce."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from posttrain.cli.app import app
from posttrain.data.lines import lines
from posttrain.errors import DataError, PosttrainError
from posttrain.recipe.file import chosen_rewards
from posttrain.reward import Scores
from posttrain.rewards.jpeg import JpegIncompressibility
from posttrain.rewards.pickscore import PickScore
from posttrain.rewards.shapes import Shapes
from posttrain.scoring.conformance import conformance, differences
from posttrain.scoring.folder import image_files
from posttrain.scoring.probes import COUNT, probe
from posttrain.shapes.dataset import scene_at
from posttrain.shapes.render import render
from posttrain.support.images import grid_png, to_pil
from posttrain.weights.files import sha256

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "conformance").glob("*.json"))
CPU = torch.device("cpu")


def test_grids_in_a_folder_are_not_scored(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "000-00.png")
    (tmp_path / "grid.png").write_bytes(grid_png(Image.new("RGB", (8, 8))))
    assert image_files([tmp_path]) == [tmp_path / "000-00.png"]
    assert image_files([tmp_path / "grid.png"]) == [tmp_path / "grid.png"]  # named by itself
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")  # one of that name that is no grid
    (tmp_path / "torn.png").write_bytes(b"no image")  # an error of its own, later
    assert [file.name for file in image_files([tmp_path])] == ["000-00.png", "grid.png", "torn.png"]
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "step-1.png").write_bytes(grid_png(Image.new("RGB", (8, 8))))
    with pytest.raises(DataError, match=r"only grids of images \(step-1\.png\) in this folder .*\.tiff\)$"):
        image_files([tmp_path / "grids"])
    (tmp_path / "above").mkdir()
    (tmp_path / "grids").rename(tmp_path / "above" / "grids")
    with pytest.raises(DataError, match=r"no image in this folder .*, not in its subfolders\)$"):
        image_files([tmp_path / "above"])


def posttrain(*arguments):
    """What the command prints. Raises what it fails with."""
    done = CliRunner().invoke(app, ["score", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def scenes(tmp_path):
    """A folder of four images in two sizes, with metadata of each."""
    folder, rows = tmp_path / "images", []
    folder.mkdir()
    for i in range(4):
        scene = scene_at(5, i)
        image = render(scene)
        (image.resize((128, 128)) if i == 2 else image).save(folder / f"{i}.png")
        rows.append({**scene.metadata, "prompt": scene.metadata["prompt"]})
    (folder / "notes.txt").write_text("not an image")
    return folder, rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def records(path):
    return [json.loads(raw) for _, raw in lines(path)]


def test_scores_equal_the_rewards_own_and_are_written_in_order(scenes, tmp_path):
    folder, rows = scenes
    rows[1] = {**rows[1], "include": [{"class": "square", "count": 4}]}  # so that not all score 1
    file = write(tmp_path / "p.jsonl", rows)
    shown = posttrain(
        folder, "--prompts", file, "--reward", "shapes", "--reward", "jpeg_incompressibility",
        "--output", tmp_path / "out" / "s.jsonl", "--batch-size", 3,
    )  # fmt: skip
    found = records(tmp_path / "out" / "s.jsonl")
    assert [Path(r["image"]).name for r in found] == ["0.png", "1.png", "2.png", "3.png"]
    for row, record in zip(rows, found, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(record["image"]))).permute(2, 0, 1)[None].float() / 255
        expected = Shapes().load(CPU)(pixels, [row["prompt"]], [row])
        assert record["scores"]["shapes"] == expected.value.item()
        assert record["scores"]["shapes/strict"] == expected.details["strict"].item()
        assert record["scores"]["jpeg_incompressibility"] == pytest.approx(
            JpegIncompressibility().load(CPU)(pixels, [""], [{}]).value.item()
        )
        assert record["prompt"] == row["prompt"]
    assert len({r["scores"]["shapes"] for r in found}) > 1
    assert f"{np.mean([r['scores']['shapes'] for r in found]):.3f}" in shown


def test_rows_that_name_their_image_may_come_in_any_order(scenes, tmp_path):
    folder, rows = scenes
    named = [{"image": f"{i}.png", **row} for i, row in enumerate(rows)]
    file = write(tmp_path / "p.jsonl", named[::-1])
    posttrain(folder, "--prompts", file, "--reward", "shapes", "--output", tmp_path / "s.jsonl")
    found = records(tmp_path / "s.jsonl")
    assert [Path(r["image"]).name for r in found] == ["3.png", "2.png", "1.png", "0.png"]
    assert [r["scores"]["shapes"] for r in found] == [1.0] * 4


def test_one_prompt_for_all_images_and_fields_of_the_reward(scenes, tmp_path):
    folder, _ = scenes
    shown = posttrain(
        folder / "0.png", folder / "3.png", "--prompt", 'the word "A"', "--reward", "jpeg_compressibility"
    )
    assert "2 images" in shown
    (reward,) = chosen_rewards(["shapes"], ["score=strict"])
    assert reward.score == "strict"
    two = chosen_rewards(["jpeg_compressibility", "shapes"], ["shapes.score=lenient"])
    assert two[1].score == "lenient"


def test_the_interval_of_one_prompts_images_has_a_width(scenes, tmp_path):
    folder, _ = scenes
    shown = posttrain(folder, "--prompt", "a shape", "--reward", "jpeg_incompressibility")
    mean, low, high = (float(w.strip("[],")) for w in shown.splitlines()[-1].split()[1:4])
    assert low < mean < high


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["IMAGES", "--prompts", "three.txt"], "4 images and 3 prompts in .*three.txt"),
        (["IMAGES", "--prompts", "half.jsonl"], "1 of 2 rows name their 'image'"),
        (["IMAGES", "--prompts", "other.jsonl"], "image '9.png' is none of the 4 images"),
        (["IMAGES", "--prompts", "few.jsonl"], "4 images and 1 rows .* no row names 1.png, 2.png, 3.png"),
        (["IMAGES"], "say what the images should show"),
        (["IMAGES", "--prompt", "a", "--prompts", "three.txt"], "say what the images should show"),
        (["--prompt", "a"], "say which images"),
        (["nowhere.png", "--prompt", "a"], "no file 'nowhere.png'"),
        ([".", "--prompt", "a"], "no image in this folder"),
        (["three.txt", "--prompt", "a"], "not an image"),
        (["IMAGES", "--prompt", "a", "--reward", "ocr"], "--prompt cannot be scored: ocr"),
        (["IMAGES", "--prompt", "a", "--reward", "shapes"], "--prompt cannot be scored: shapes"),
        (["IMAGES", "--prompt", "a", "--reward", "ocrr"], "did you mean 'ocr'"),
        (["IMAGES", "--prompt", "a", "--set", "wait=1"], "wait: no such field"),
        (["IMAGES", "--prompt", "a", "--set", "weight=2"], "would have no effect"),
        (["IMAGES", "--prompt", "a", "--reward", "ocr", "--reward", "shapes", "--set", "score=strict"], "of which reward: ocr. or shapes."),
        (["IMAGES", "--conformance"], "images and prompts of its own"),
        (["IMAGES", "--prompt", "a", "--against", "x"], "give --conformance too"),
        (["--conformance", "--reward", "ocr", "--reward", "shapes"], "one reward at a time"),
        (["--conformance", "--against", "three.txt"], "not a conformance file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_error(scenes, tmp_path, monkeypatch, arguments, words):
    folder, _ = scenes
    monkeypatch.chdir(tmp_path)
    Path("three.txt").write_text("a\nb\nc\n", encoding="utf-8")
    write(Path("half.jsonl"), [{"image": "0.png", "prompt": "a"}, {"prompt": "b"}])
    write(Path("other.jsonl"), [{"image": "9.png", "prompt": "a"}])
    write(Path("few.jsonl"), [{"image": "0.png", "prompt": "a"}])
    if "--reward" not in arguments:
        arguments = [*arguments, "--reward", "jpeg_compressibility"]
    with pytest.raises(PosttrainError, match=words):
        posttrain(*(folder if a == "IMAGES" else a for a in arguments))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_shipped_scores_reproduce(file):
    there = json.loads(file.read_text())
    assert there["reward"] == file.stem
    assert len({case["score"] for case in there["cases"]}) > 1
    (reward,) = chosen_rewards([file.stem], [])
    # the text detector's and the JPEG encoder's builds may differ in the last digits
    assert differences(conformance(reward, CPU), there, 1e-5 if file.stem == "shapes" else 0.02) == []


def test_the_offline_rewards_have_shipped_scores():
    assert [f.stem for f in SHIPPED] == ["jpeg_compressibility", "jpeg_incompressibility", "ocr", "shapes"]


def test_probes_are_functions_of_their_index_that_differ():
    assert [probe(i)[0].tobytes() for i in range(COUNT)] == [probe(i)[0].tobytes() for i in range(COUNT)]
    assert len({probe(i)[0].tobytes() for i in range(COUNT)}) == COUNT
    assert len({probe(i)[0].size for i in range(COUNT)}) == 4


def test_differences_are_told_one_by_one():
    here = conformance(Shapes(), CPU)
    assert differences(here, copy.deepcopy(here), 0) == []
    there = copy.deepcopy(here)
    there["cases"][0]["score"] += 1e-3
    there["cases"][1]["details"]["strict"] = 1.0
    there["cases"][2]["image"] = "0" * 64
    there["settings"]["score"] = "strict"
    del there["cases"][3]
    found = "\n".join(differences(here, there, 1e-5))
    for words in (
        "settings: ",
        "case 0: score: 1.0 here",
        "case 3: strict",
        "case 6: another image",
        "case 9: only here",
    ):
        assert words in found
    assert "case 0" not in "\n".join(differences(here, there, 1e-2))
    assert found.count("\n") == 4


def test_weights_are_told_by_their_hashes_not_by_their_place(tmp_path, monkeypatch):
    names = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(name)

    def load(self, device):
        return lambda images, prompts, rows: Scores(torch.arange(len(prompts), dtype=torch.float32))

    monkeypatch.setattr(PickScore, "load", load)

    def of(folder):
        place = str(tmp_path / folder)
        return conformance(PickScore(path=place, processor=place), CPU)

    here = of("a")
    assert here["weights"]["path"] == {name: sha256(tmp_path / "a" / name) for name in names[:2]}
    assert str(tmp_path) not in json.dumps(here)
    assert differences(here, of("b"), 0) == []
    (tmp_path / "b" / "model.safetensors").write_text("retrained")
    (found,) = differences(here, of("b"), 0)
    assert found.startswith("weights.path.model.safetensors: SHA-256")


def test_the_command_line_writes_compares_and_fails_on_a_difference(tmp_path):
    arguments = ("--conformance", "--reward", "jpeg_incompressibility", "--output", tmp_path / "j.json")
    posttrain(*arguments)
    written = json.loads((tmp_path / "j.json").read_text())
    sizes = JpegIncompressibility().load(CPU)
    image, _ = probe(2)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    assert np.array_equal(np.array(to_pil(pixels)[0]), np.array(image))
    assert written["cases"][2]["score"] == sizes(pixels, [""], [{}]).value.item()
    assert "12 scores as in" in posttrain(*arguments[:3], "--against", tmp_path / "j.json")
    written["cases"][2]["score"] += 1
    (tmp_path / "j.json").write_text(json.dumps(written))
    with pytest.raises(PosttrainError, match=r"differs from .*\n  case 2: score: "):
        posttrain(*arguments[:3], "--against", tmp_path / "j.json")
