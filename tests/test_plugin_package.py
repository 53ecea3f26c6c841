"""The package in examples/plugin is installed, found and used like any other; the pages about it show its files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import read
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from posttrain.testing import AlgorithmLaws, BlockLaws, DataLaws, ModelLaws, RewardLaws, laws

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "plugin"
PAGES = {
    "plugins": BlockLaws, "plugin-algorithm": AlgorithmLaws, "plugin-reward": RewardLaws,
    "plugin-model": ModelLaws, "plugin-data": DataLaws,
}  # fmt: skip
"""Page -> the laws that it lists."""
WRONG = {
    "algorithm": ("type: scheduled_huber", "type: scheduled_hubber"),
    "field": ("threshold: 0.2", "treshold: 0.2"),
    "value": ("threshold: 0.2", "threshold: 2"),
    "model": ("type: pixels", "type: pixel"),
    "reward": ("    rewards: colorfulness", "    rewards: colorfulnes"),
    "data": ("type: png_prompts", "type: png_prompt"),
    "folder": ("folder: pictures", "folder: no_pictures"),
}
"""What is written -> what stands there, and what replaces it."""
COMMANDS = {
    "algorithms": 0, "models": 0, "data": 0, "rewards": 0, "schema": 0, "check recipe.yaml": 0,
    "run recipe.yaml --output out": 0, "status out": 0, **{f"check {name}.yaml": 1 for name in WRONG},
}  # fmt: skip
"""Command -> its exit code."""
DRIVER = """
import json, os, sys
import forked, posttrain.recipe.catalogue, posttrain.scoring.catalogue
printed = {}
for line, code in json.load(sys.stdin).items():
    done = forked.posttrain(*line.split(), cwd=os.getcwd(), code=code, PYTHONPATH=os.environ["PYTHONPATH"])
    printed[line] = done.stdout + done.stderr
json.dump(printed, sys.stdout)
"""


def called(*command, **how):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of installed packages that has the package."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, folder / "source")  # a build leaves files beside its source
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    called(*pip, "--target", folder / "site", folder / "source")
    return folder / "site"


@pytest.fixture(scope="module")
def environment(site):
    paths = [site, ROOT, ROOT / "tests"]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recipe, faulty copies of it, and images as a web UI writes them."""
    folder = tmp_path_factory.mktemp("run")
    text = (SOURCE / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text)
    for name, (right, wrong) in WRONG.items():
        assert right in text
        (folder / f"{name}.yaml").write_text(text.replace(right, wrong, 1))
    (folder / "pictures").mkdir()
    for i, color in enumerate(["red", "green", "blue", "yellow"]):
        info = PngInfo()
        info.add_text("parameters", f"a {color} wall\nNegative prompt: people\nSteps: 20, Seed: {i}")
        Image.new("RGB", (40, 24), color).save(folder / "pictures" / f"{i}.png", pnginfo=info)
    return folder


@pytest.fixture(scope="module")
def printed(environment, folder):
    """Command -> what it printed where the package is installed."""
    command = [sys.executable, "-c", DRIVER]
    return json.loads(called(*command, cwd=folder, env=environment, input=json.dumps(COMMANDS)))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("algorithms", "scheduled_huber"),
        ("models", "pixels"),
        ("data", "png_prompts"),
        ("rewards", "colorfulness"),
    ],
)
def test_its_types_are_listed_with_the_package(printed, command, name):
    lines = printed[command].splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.split()[:1] == [name])
    assert any("from posttrain-example 1.0" in line for line in lines[at : at + 2])


def test_the_schema_has_its_fields(printed):
    schema = json.loads(printed["schema"])["$defs"]
    for name, field in (("ScheduledHuber", "threshold"), ("Pixels", "depth"), ("PngPrompts", "folder")):
        assert schema[name]["properties"][field]["description"]
    assert schema["Colorfulness"]["properties"]["type"]["const"] == "colorfulness"


def test_check_knows_what_it_costs(printed):
    text = printed["check recipe.yaml"]
    assert re.search(r"learn +base +scheduled_huber +8 +32 +32 ", text)
    assert "learn: data PNG files with prompts in pictures, resolution 32" in text
    assert "rewards: colorfulness x 1" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("algorithm", "no type 'scheduled_hubber' (did you mean 'scheduled_huber'?); one of"),
        (
            "field",
            "stages.0.algorithm.treshold (stage 'learn'): no such field (did you mean 'threshold'?); scheduled_huber has type, threshold",
        ),
        (
            "value",
            "stages.0.algorithm.threshold (stage 'learn'): input should be less than or equal to 1 (found 2)",
        ),
        ("model", "no type 'pixel' (did you mean 'pixels'?); one of"),
        ("reward", "no type 'colorfulnes' (did you mean 'colorfulness'?); one of"),
        ("data", "no type 'png_prompt' (did you mean 'png_prompts'?); one of"),
        ("folder", "stages.0.data.folder (stage 'learn'): no folder 'no_pictures'"),
    ],
)
def test_errors_name_its_types_and_fields(printed, name, words):
    assert words in printed[f"check {name}.yaml"]


def test_a_recipe_of_all_four_runs(printed, folder):
    text = printed["run recipe.yaml --output out"]
    assert re.search(r"base +[\d.]+ \[[\d., ]+\]", text)
    rows = [
        json.loads(line) for line in (folder / "out" / "learn" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    made = json.loads((folder / "out" / "learn" / "made_from.json").read_text())
    assert made["data"]["images"]["count"] == 4
    rows = [
        json.loads(line) for line in (folder / "out" / "vivid" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all("reward/colorfulness" in row for row in rows if "loss" in row)
    written = (folder / "out" / "recipe.yaml").read_text()
    for name in ("scheduled_huber", "pixels", "png_prompts", "colorfulness"):
        assert f"type: {name}\n" in written
    assert "colorfulness" in printed["status out"]


def test_its_own_tests_keep_the_laws(environment, folder, tmp_path):
    """Those that a reader of the pages runs; the installed package, not its source."""
    shutil.copy(SOURCE / "test_posttrain_example.py", tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--rootdir",
        ".",
    ]
    done = called(*command, cwd=tmp_path, env=environment)
    count = sum(len(list(laws(kind))) for page, kind in PAGES.items() if page != "plugins")
    assert int(re.search(r"(\d+) passed", done)[1]) >= count


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_is_that_of_the_package(page):
    blocks, _ = read((ROOT / "docs" / f"{page}.md").read_text(), page)
    code = [block for block in blocks if block.language not in ("text", "bash")]
    assert code
    for block in code:
        named = block.marks.get("copy of", "")  # tests/test_docs_run.py compares the two
        above = f"{page}:{block.line}: above the block stands no <!-- copy of: examples/plugin/... -->"
        assert named.startswith("examples/plugin/"), above


def test_each_file_of_the_package_is_shown_whole():
    shown = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in PAGES)
    files = [
        SOURCE / "pyproject.toml",
        SOURCE / "recipe.yaml",
        *(SOURCE / "posttrain_example").glob("[a-z]*.py"),
    ]
    assert len(files) == 6
    assert [file.name for file in files if file.read_text() not in shown] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_lists_the_laws(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    kind = PAGES[page]
    of_all = set() if kind is BlockLaws else {law.test for law in laws(BlockLaws)}
    rows = re.findall(r"^\| (.+) \| `(test_\w+)` \|$", text, re.M)
    assert rows == [(law.words, law.test) for law in laws(kind) if law.test not in of_all]
