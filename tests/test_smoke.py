"""A smoke run: any recipe shrunk to about a minute, with every change told, in a folder of its own."""

import json
from pathlib import Path

import pytest
from PIL import Image
from pipelines import pipeline_folder

from posttrain.cli.smoke import run_shrunk
from posttrain.errors import PosttrainError
from posttrain.recipe.checks import machine_problems
from posttrain.recipe.file import load_recipe, parse_recipe, shipped_recipes
from posttrain.recipe.smoke import smoke
from posttrain.support.differences import differences

FOLDER = Path("runs/x-smoke")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_shrinks_to_one_that_runs_here_and_keeps_its_parts(name):
    given = load_recipe(name, checks=False)
    small = smoke(given, FOLDER)
    recipe = small.recipe
    assert machine_problems(recipe) == []
    assert recipe.name == f"{name}-smoke"
    assert [stage.algorithm.type for stage in recipe.stages] == [s.algorithm.type for s in given.stages]
    for stage, whole in zip(recipe.stages, given.stages, strict=True):
        left = {"targets"}  # the tiny model may have other layers
        assert stage.tune.model_dump(exclude=left) == whole.tune.model_dump(exclude=left)
    assert (recipe.evaluation is None) == (given.evaluation is None)
    assert "tiny" in recipe.model.model_dump_json()
    assert not recipe.cache.prompts
    assert recipe.cache.latents == "off"
    for stage in recipe.stages:
        assert stage.train.steps <= 4
        assert stage.train.batch_size <= 4
        assert getattr(stage.data, "resolution", 64) == 64
    if recipe.evaluation is not None:
        assert recipe.evaluation.resolution == 64
        assert recipe.evaluation.images_per_prompt * recipe.evaluation.steps <= 4
    assert smoke(recipe, FOLDER).recipe == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_changed_field_is_told_with_its_old_and_new_value(name):
    given = load_recipe(name, checks=False)
    small = smoke(given, FOLDER)
    changed = list(differences(given.model_dump(mode="json"), small.recipe.model_dump(mode="json")))
    assert [line for line in changed if not any(told.startswith(line) for told in small.changes)] == []
    if "sd35m" in name:
        assert any("its weights are not on this machine" in line for line in small.changes)


RECIPE = """
name: own
tracker: none
device: cpu
model: {{type: sd3, path: {model}, max_sequence_length: 16}}
stages:
  - name: sft
    algorithm: {{type: sft}}
    data: {{images: {folder}/train.jsonl, resolution: 16}}
    train: {{steps: 900, warmup_steps: 100, batch_size: 64, micro_batch: 32, keep_every: 500}}
  - name: grpo
    {start}
    algorithm: {{type: flow_grpo, num_steps: 8, group_size: 8, sde_window_size: 2, sde_window_range: [3, 7]}}
    data: {{prompts: {folder}/prompts.txt, resolution: 16}}
    rewards: {{'brightness:score': 2.0, pickscore: 1.0}}
    tune: {{type: lora, rank: 2}}
    train: {{steps: 900, batch_size: 64, steps_per_batch: 4, compile: true, gradient_checkpointing: 0.5, keep_best: pickscore}}
    monitor: {{every: 100}}
evaluation: {{prompts: {folder}/prompts.txt, rewards: [pickscore, 'brightness:score'], resolution: 16, steps: 30}}
parallel: {{strategy: fsdp2}}
cache: {{prompts: true}}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The text of a recipe with data of its own; a reward's weights are not here."""
    monkeypatch.setattr("posttrain.weights.published.Weights.local", lambda self, source: None)
    rows = [{"image": f"{i}.png", "caption": "a red circle"} for i in range(5)]
    for row in rows:
        Image.new("RGB", (20, 16), "red").save(tmp_path / row["image"])
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.txt").write_text("".join(f"a red circle {i}\n" for i in range(40)))
    return lambda start="start_from: sft": RECIPE.format(
        model=pipeline_folder(), folder=tmp_path, start=start
    )


def test_data_weights_and_rewards_that_are_here_stay(own, tmp_path):
    small = smoke(parse_recipe(own(), "own.yaml", checks=False), tmp_path / "out")
    sft, grpo = small.recipe.stages
    assert small.recipe.model.path == str(pipeline_folder())
    assert sft.data.images == tmp_path / "train.jsonl"
    assert grpo.data.prompts.path == tmp_path / "prompts.txt"
    assert [(reward.label, reward.weight) for reward in grpo.rewards] == [("score", 2.0)]
    assert [reward.label for reward in small.recipe.evaluation.rewards] == ["score"]
    assert grpo.train.keep_best is None
    assert (grpo.train.compile, grpo.train.gradient_checkpointing) == (False, "selective")
    assert (grpo.train.steps_per_batch, grpo.train.steps, grpo.monitor.every) == (2, 4, 2)
    assert grpo.algorithm.num_steps == 8, "the window would not fit into fewer"
    assert small.recipe.parallel.strategy == "auto"
    assert any(line.startswith("stages.1.rewards.1: pickscore is left out") for line in small.changes)
    (file,) = small.files
    assert small.recipe.evaluation.prompts.path == file == tmp_path / "out" / "prompts.jsonl"
    prompts = [json.loads(line)["prompt"] for line in small.files[file].splitlines()]
    assert prompts == [f"a red circle {i}" for i in range(4)]


def test_weights_of_another_model_are_not_put_into_the_tiny_one(own, tmp_path):
    text = own(f"start_from: {tmp_path}").replace(str(pipeline_folder()), "some/model")
    small = smoke(parse_recipe(text, "own.yaml", checks=False), tmp_path / "out")
    assert small.recipe.model.path == "posttrain/tiny-sd3"
    assert small.recipe.stages[1].start_from == "base"
    assert any("these weights are not used here" in line for line in small.changes)


def test_a_model_that_a_cpu_cannot_run_in_a_minute_is_replaced(own, tmp_path, monkeypatch):
    monkeypatch.setattr("posttrain.recipe.stand_ins.LARGE", 1000)
    small = smoke(parse_recipe(own(), "own.yaml", checks=False), tmp_path / "out")
    assert small.recipe.model.path == "posttrain/tiny-sd3"
    assert any("a CPU needs minutes for its" in line for line in small.changes)


def test_a_smoke_run_writes_a_report_begins_anew_and_spares_other_runs(own, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "own.yaml"
    file.write_text(own())
    for _ in range(2):
        run_shrunk(str(file), (), None, 1, ())
        printed = capsys.readouterr().out
        assert "stages.0.train.steps (was 900, now 2)" in printed
        assert "finished before" not in printed
    folder = tmp_path / "runs" / "own-smoke"
    assert (folder / "report.html").is_file()
    for stage in ("sft", "grpo"):
        assert (folder / stage / "final").is_dir()
        assert (folder / stage / "evaluation" / "eval.json").is_file()
    (folder / "run.json").write_text('{"name": "own"}')
    with pytest.raises(PosttrainError, match="would remove the run"):
        run_shrunk(str(file), (), None, 1, ())
    for options in ((2, ()), (1, ["sft"])):
        with pytest.raises(PosttrainError, match="--smoke"):
            run_shrunk(str(file), (), None, *options)


def test_a_smoke_run_replaces_no_prompts_of_the_users_own(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text(own())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(PosttrainError, match=r"would replace 'prompts\.jsonl': give another --output"):
        run_shrunk("own.yaml", (), Path(), 1, ())
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "mine"}\n'
