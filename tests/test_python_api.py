"""Tests what Python sees of posttrain: results of runs, and classes that are defined anywhere."""

import base64
import io
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from html_page import parsed
from rich.console import Console
from runs import EVALUATION, HEAD, recipe, stage

import posttrain
from posttrain.algorithm import Algorithm, Items, Losses
from posttrain.errors import PosttrainError, RecipeError
from posttrain.recipe.file import dump_recipe, parse_recipe
from posttrain.stages.result import Score

ROOT = Path(__file__).parent.parent
MINE = """
from typing import ClassVar, Literal
import torch
from posttrain.algorithm import Algorithm, Items, Losses

class Mine(Algorithm):
    type: Literal["mine"] = "mine"
    needs: ClassVar = "images"
    scale: float = 1.0

    def collect(self, batch, tools):
        sigma = torch.sigmoid(tools.draws.normal("timestep", ()))
        fields = {"latents": batch.latents, "sigma": sigma, "prompt_index": batch.prompt_index}
        return Items(torch.ones_like(sigma), {**fields, "sample_index": batch.sample_index}, batch.conditions)

    def loss(self, items, policy):
        velocity = policy.velocity(items.latents, items.sigma, items.condition)
        return Losses(self.scale * velocity.square().flatten(1).mean(1))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Two stages and an evaluation, run by the API."""
    folder = tmp_path_factory.mktemp("api") / "run"
    made = recipe(stage("sft"), stage("more"), evaluation=EVALUATION)
    return posttrain.run(made, str(folder), Console(file=io.StringIO()))


def test_a_run_gives_its_results(result):
    assert result.stages == ["base", "sft", "more"]
    score = result.scores("sft")["shapes"]
    assert 0 <= score.low <= score.mean <= score.high <= 1
    samples = result.samples("sft")
    assert score.mean == pytest.approx(sum(row["scores"]["shapes"] for row in samples) / len(samples))
    assert (result.final("more") / "model_index.json").is_file()
    assert result.cost("sft")["steps"] == 6
    assert [row["step"] for row in result.metrics("sft")] == [*range(1, 7)]
    assert result.report.is_file()
    assert result.recipe.stages[1].name == "more"


def test_one_sample_has_no_interval_and_no_significant_gain(result, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(result.folder, folder)
    for stage_name in ("base", "sft"):
        evaluation = folder / stage_name / "evaluation"
        card = json.loads((evaluation / "eval.json").read_text())
        card["scores"]["shapes"] |= {"mean": 0.5, "low": 0.5, "high": 0.5, "count": 1}
        (evaluation / "eval.json").write_text(json.dumps({**card, "images": 1}))
        records = map(json.loads, (evaluation / "records.jsonl").read_text().splitlines())
        first = min(records, key=lambda record: (record["prompt"], record["index"]))
        (evaluation / "records.jsonl").write_text(json.dumps(first) + "\n")
    one = posttrain.open_run(folder)
    assert one.scores("base")["shapes"] == Score(0.5, -math.inf, math.inf)
    assert one.gain("sft", "shapes").high == math.inf
    (scores, _) = parsed(one._repr_html_()).all("table")
    base, sft, _ = (row.one("td").text for row in scores.one("tbody").all("tr"))
    assert base == "0.500"
    assert re.fullmatch(r"0\.500, [+-]\d\.\d{3} n\.s\.", sft)


def test_images_open_and_show_in_notebooks(result):
    pictures = result.images("sft")
    assert len(pictures) == 2
    assert pictures[0].open().size == (16, 16)
    assert pictures[0]._repr_png_().startswith(b"\x89PNG")
    assert {p.prompt for p in pictures} <= {row["prompt"] for row in result.samples("sft")}


def test_the_table_has_a_row_for_each_stage_and_score(result):
    rows = result.table()
    assert [(row["stage"], row["score"]) for row in rows if "/" not in row["score"]] == [
        (name, "shapes") for name in result.stages
    ]
    more = next(row for row in rows if (row["stage"], row["score"]) == ("more", "shapes"))
    base = next(row for row in rows if (row["stage"], row["score"]) == ("base", "shapes"))
    assert more["gain_mean"] == pytest.approx(more["mean"] - base["mean"])
    assert more["gain_low"] <= more["gain_mean"] <= more["gain_high"]
    assert "gain_mean" not in base
    assert result.gain("more", "shapes", over="sft").mean == pytest.approx(
        more["mean"] - result.scores("sft")["shapes"].mean
    )
    assert re.search(r"base .*\n.*sft .*\n.*more ", str(result))


def test_a_notebook_shows_the_table_and_the_grid(result):
    page = parsed(result._repr_html_())
    scores, grid = page.all("table")
    assert [row.one("th").text for row in scores.one("tbody").all("tr")] == ["base", "sft", "more"]
    sft = result.scores("sft")["shapes"]
    gain = result.gain("sft", "shapes")
    shown = scores.one("tbody").all("tr")[1].one("td").text
    assert shown.startswith(f"{sft.mean:.3f} [{sft.low:.3f}, {sft.high:.3f}], {gain.mean:+.3f}")
    assert shown.endswith(" n.s.") == (gain.low <= 0 <= gain.high)
    prompts = [cell.text for cell in grid.one("thead").all("small")]
    assert prompts == [picture.prompt for picture in result.images("base")]
    for stage_name, row in zip(result.stages, grid.one("tbody").all("tr"), strict=True):
        assert row.one("th").text == stage_name
        pictures = {picture.prompt: picture for picture in result.images(stage_name)}
        for image in row.all("img"):
            stored = base64.b64decode(image.attrs["src"].removeprefix("data:image/png;base64,"))
            assert stored == pictures[image.attrs["alt"]].path.read_bytes()
        assert len(row.all("img")) == len(pictures)
    assert not page.all("script")


def test_what_a_notebook_shows_escapes_names_and_lives_without_results(result, tmp_path):
    bad = "<b onload='x'>&amp;\"</b>"
    folder = shutil.copytree(result.folder, tmp_path / "a <i>")
    for file in folder.glob("*/evaluation/*.json*"):
        file.write_text(file.read_text("utf-8").replace("a photo", json.dumps(bad)[1:-1]))
    next(folder.glob("sft/evaluation/grid/*.png")).write_bytes(b"cut off")
    page = parsed(posttrain.open_run(folder)._repr_html_())
    assert {cell.text[: len(bad)] for cell in page.all("table")[1].one("thead").all("small")} == {bad}
    assert not page.all("i")
    assert len(page.all("img")) == sum(len(result.images(s)) for s in result.stages) - 1

    for stage_name in ("base", "sft", "more"):
        shutil.rmtree(folder / stage_name)
    page = parsed(posttrain.open_run(folder)._repr_html_())
    assert (page.all("table"), page.all("p")[1].text) == ([], "base, sft, more")


def test_a_finished_folder_opens_again(result):
    again = posttrain.open_run(str(result.folder))
    assert again.table() == result.table()
    assert repr(again) == f"RunResult({str(result.folder)!r}, stages=['base', 'sft', 'more'])"


def test_what_is_not_there_is_one_error(result, tmp_path):
    with pytest.raises(PosttrainError, match=r"no stage 'stf' .did you mean 'sft'.*it has base, sft, more"):
        result.scores("stf")
    with pytest.raises(PosttrainError, match=r"'base' is the model before any stage: recipe\.model names it"):
        result.final("base")
    with pytest.raises(PosttrainError, match=r"is no run folder: it has no recipe\.yaml"):
        posttrain.open_run(tmp_path)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module ``taste`` with an algorithm, in the current folder."""
    (tmp_path / "taste.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("taste", None)


def text_of(algorithm):
    return HEAD + "stages:\n" + stage("own", f"{{type: '{algorithm}', scale: 2.0}}")


def test_a_recipe_names_a_class_of_any_module(mine):
    (mine / "r.yaml").write_text(text_of("taste:Mine"))
    result = posttrain.run("r.yaml", console=Console(file=io.StringIO()))
    assert result.cost("own")["steps"] == 6
    code = "import posttrain; print(posttrain.open_run('runs/small').recipe.stages[0].algorithm)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    seen = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert seen.stdout == "type='mine' scale=2.0\n", "a process that has not loaded it"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (
            "nothing_here:Mine",
            "cannot load the algorithm 'nothing_here:Mine': no module 'nothing_here', neither",
        ),
        ("taste:Other", "cannot load the algorithm 'taste:Other': the module 'taste' has no 'Other'"),
        ("taste:torch", "'taste:torch' is no algorithm with a 'type' of its own"),
        ("taste:Algorithm", "'taste:Algorithm' is no algorithm with a 'type' of its own"),
        (
            "broken:Mine",
            "cannot load the algorithm 'broken:Mine': ZeroDivisionError: division by zero \\(.*broken.py, line 1\\)",
        ),
        ("__main__:Gone", "'__main__:Gone' was defined in a notebook or script: define it there first"),
    ],
)
def test_a_class_that_cannot_be_had_is_one_error(mine, named, words):
    (mine / "broken.py").write_text("1 / 0")
    with pytest.raises(
        RecipeError, match=rf"r\.yaml:\d+: stages\.0\.algorithm\.type \(stage 'own'\): {words}"
    ):
        parse_recipe(text_of(named), "r.yaml")


def test_fields_of_ones_own_class_are_checked_by_name(mine):
    text = text_of("taste:Mine").replace("scale: 2.0", "scales: 2.0")
    with pytest.raises(RecipeError, match=r"no such field .did you mean 'scale'.*; mine has type, scale"):
        parse_recipe(text, "r.yaml")


def of_a_cell():
    """The class that a notebook's cell defines."""

    class Cell(Algorithm):
        type: Literal["cell"] = "cell"
        needs: ClassVar = "images"

        def collect(self, batch, tools):
            fields = {"prompt_index": batch.prompt_index, "sample_index": batch.sample_index}
            return Items(torch.ones(len(batch)), fields, batch.conditions)

        def loss(self, items, policy):
            return Losses(torch.zeros(len(items)))

    return Cell


def test_a_class_of_a_notebook_is_passed_as_an_object():
    try:
        of_a_cell()
        again = of_a_cell()  # the cell is run again
        assert Algorithm.variants["cell"] is again
        made = recipe(stage("sft"))
        made = posttrain.Recipe(
            name="a",
            model=made.model,
            stages=[
                posttrain.Stage(
                    name="b", algorithm=again(), data=made.stages[0].data, train=made.stages[0].train
                )
            ],
        )
        assert type(made.stages[0].algorithm) is again
        text = dump_recipe(made)
        assert "type: test_python_api:of_a_cell.<locals>.Cell" in text
        assert parse_recipe(text, "r.yaml", checks=False) == made
    finally:
        del Algorithm.variants["cell"]


def test_a_folder_of_a_stage_is_no_run(result):
    with pytest.raises(PosttrainError, match=r"run/sft' is a stage's folder: open its run, '.*/run'"):
        posttrain.open_run(result.folder / "sft")


def test_a_run_that_has_no_list_of_stages_says_so(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: a\n")
    with pytest.raises(PosttrainError, match=r"no stage 'sft': it has none, as there is no run\.json in"):
        posttrain.open_run(tmp_path).scores("sft")


def test_items_that_all_have_weight_0_train_nothing(mine, tmp_path):
    (tmp_path / "taste.py").write_text(MINE.replace("torch.ones_like(sigma)", "torch.zeros_like(sigma)"))
    with pytest.raises(PosttrainError, match="trained nothing: all items had weight 0"):
        posttrain.run(
            recipe(stage("sft", "{type: 'taste:Mine'}")), tmp_path / "run", Console(file=io.StringIO())
        )


def test_a_misspelt_score_has_no_gain(result):
    with pytest.raises(PosttrainError, match=r"no score 'shape' \(did you mean 'shapes'\?\): it has shapes"):
        result.gain("sft", "shape")


def test_two_classes_cannot_have_one_name():
    with pytest.raises(TypeError, match=r"type 'sft' is taken by posttrain\.algorithms\.sft\.SFT"):

        class Another(Algorithm):
            type: Literal["sft"] = "sft"


def test_the_loop_in_the_docs_trains():
    docs = (ROOT / "docs" / "python.md").read_text("utf-8")
    source = (ROOT / "examples" / "own_loop.py").read_text("utf-8")
    body = source[source.index("def train") : source.index("\n\nif __name__")].rstrip()
    assert body in docs
    losses = runpy.run_path(str(ROOT / "examples" / "own_loop.py"))["train"](steps=2, batch_size=2)
    assert len(losses) == 2
    assert 0 < losses[0] < 2
    assert losses[0] != losses[1]


def test_the_recipe_in_code_is_whole():
    made = runpy.run_path(str(ROOT / "examples" / "recipe_in_code.py"))["recipe"](steps=3)
    assert [s.algorithm.type for s in made.stages] == ["sft", "soar"]
    assert parse_recipe(dump_recipe(made), "r.yaml") == made


SFT_STAGE = {
    "name": "a",
    "algorithm": {"type": "sft"},
    "data": {"type": "shapes", "images": 4},
    "train": {"steps": 1},
}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: posttrain.Stage(**{**SFT_STAGE, "algorithm": "sft"}), "Stage: algorithm: expected a block of fields, found the text 'sft': write {type: sft}"),
        (lambda: posttrain.Stage(**SFT_STAGE, tun=3), "Stage: tun: no such field (did you mean 'tune'?); stage has name, "),
        (lambda: posttrain.Stage(**{**SFT_STAGE, "train": {"steps": 0}}), "Stage: train.steps: input should be greater than or equal to 1 (found 0)"),
        (lambda: posttrain.Train(batch_size="x"), "Train: steps: missing, and it has no default\nTrain: batch_size: expected a whole number, found the text 'x'"),
        (lambda: posttrain.Recipe(name="a", stages=[], model=None), "Recipe: model: is empty; give it a value or remove it"),
        (lambda: posttrain.run(None), "a recipe is a Recipe, a YAML file, or the name of a shipped one, not NoneType"),
        (lambda: posttrain.load_recipe(3), "a recipe is a Recipe, a YAML file, or the name of a shipped one, not int"),
    ],
)  # fmt: skip
def test_what_is_made_in_python_is_refused_in_the_words_of_recipes(make, words):
    with pytest.raises(RecipeError) as refused:
        make()
    assert str(refused.value).startswith(words)
    assert "pydantic" not in str(refused.value)
