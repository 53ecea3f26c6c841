"""A run spares what lies in the folder that it is given."""

import pytest
from runs import HEAD, recipe, run_quietly, stage
from typer.testing import CliRunner

from posttrain.cli.app import app
from posttrain.errors import PosttrainError


def run(*arguments):
    return CliRunner().invoke(app, ["run", *arguments], catch_exceptions=False)


def test_a_run_does_not_replace_the_recipe_that_it_is_given(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("posttrain.stages.chain.run", lambda recipe, folder, *_: begun.append(str(folder)))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(HEAD + "stages:\n" + stage("sft"))
    with pytest.raises(PosttrainError, match=r"--output: a run in '\.' would replace recipe\.yaml by"):
        run("recipe.yaml", "--output", ".")
    file.rename(tmp_path / "r.yaml")
    assert run("r.yaml", "--output", ".").exit_code == 0
    (tmp_path / "r.yaml").rename(file)
    (tmp_path / "run.json").write_text("{}")  # a run that goes on by its own recipe
    assert run("recipe.yaml", "--output", ".").exit_code == 0
    assert begun == [".", "."]


def test_a_run_does_not_replace_the_report_of_something_else(tmp_path):
    page = tmp_path / "report.html"
    page.write_text("of another program")
    small = recipe(stage("sft", train="{steps: 1, batch_size: 2, sample_every: null}"))
    with pytest.raises(
        PosttrainError, match=r"is no run, and has a report\.html that the run's report would"
    ):
        run_quietly(small, tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == ["report.html"]
    assert page.read_text() == "of another program"
    page.rename(tmp_path / "other.html")
    run_quietly(small, tmp_path)
    page.write_text("cut off")
    run_quietly(small, tmp_path)
    assert "small" in page.read_text(), "a run replaces its own"
