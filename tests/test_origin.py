"""A run knows its settings, and the folder of a stage, or of a run, stands for the weights that it published."""

import io
import json
import shutil

import pytest
import torch
from pipelines import pipeline_folder
from rich.console import Console
from runs import EVALUATION, HEAD, TRAIN, recipe, run_quietly, stage

from posttrain.errors import ModelError, PosttrainError, RecipeError
from posttrain.model import Model
from posttrain.models._diffusers import native_side as side_of
from posttrain.recipe.file import parse_recipe
from posttrain.registry import discover
from posttrain.stages.artifact import open_artifact, usual_settings
from posttrain.stages.evaluation_origin import Asked, settled_evaluation
from posttrain.stages.lineage import pinned, runs_named, sources
from posttrain.stages.origin import place_in_run, settled, sources_of
from posttrain.stages.samples import SampleSettings, draw
from posttrain.weights.run_folders import last_stage, meaning_of, weights_folder

CPU = torch.device("cpu")
SHORT = TRAIN.replace("steps: 6", "steps: 2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin") / "small"
    made = recipe(stage("sft", train=SHORT), stage("more", train=SHORT), evaluation=EVALUATION)
    run_quietly(made, folder)
    return folder


def drawn(model, output, prompts=(), **settings):
    console = Console(file=io.StringIO(), width=300)
    files = draw(str(model), prompts, output, SampleSettings(images=1, **settings), console)
    return files, console.file.getvalue().splitlines()


def test_a_file_in_the_place_of_the_folder_for_samples_is_said_before_any_work(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(PosttrainError, match=r"^--output: '.*a\.png' is a file, a folder is expected$"):
        drawn("not/loaded", tmp_path / "a.png", ["a circle"])
    with pytest.raises(PosttrainError, match=r"^--output: '.*a\.png' is a file, a folder is expected$"):
        drawn("not/loaded", tmp_path / "a.png" / "b", ["a circle"])


@pytest.mark.parametrize("there", ["000-00.png", "001-00.png", "grid.png"])
def test_samples_replace_no_image_and_may_lie_beside_others(there, tmp_path):
    (tmp_path / there).write_text("mine")
    with pytest.raises(PosttrainError, match=rf"^--output: '.*' has 1 image of these names, such as {there}"):
        drawn("posttrain/tiny-sd3", tmp_path, ["a circle", "a square"], steps=1)
    assert (tmp_path / there).read_text() == "mine"
    (tmp_path / there).rename(tmp_path / "other.png")
    files, _ = drawn("posttrain/tiny-sd3", tmp_path, ["a circle", "a square"], steps=1)
    assert [file.name for file in files] == ["000-00.png", "001-00.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "000-00.png",
        "001-00.png",
        "grid.png",
        "other.png",
    ]


def test_sample_takes_what_is_not_given_from_the_recipe_of_the_run(run, tmp_path):
    from PIL import Image

    from posttrain.data.prompts import prompt_rows
    from posttrain.data.settings import ShapesPrompts

    files, lines = drawn(run, tmp_path / "a", seed=5)
    place = f"from the recipe of {run / 'more'}: "
    assert lines[:4] == [
        f"{run} is a run: its last finished stage is more",
        "from the command line: seed 5",
        f"{place}resolution 16, steps 2, guidance 2, solver euler, precision fp32",
        f"{place}the first 6 prompts",
    ]
    assert [Image.open(file).size for file in files] == [(16, 16)] * 6
    one = prompt_rows(ShapesPrompts(count=6))[2]["prompt"]
    again, _ = drawn(run / "more" / "final", tmp_path / "b", [one], seed=5)
    assert again[0].read_bytes() == files[2].read_bytes()


def test_places_of_a_run(run):
    for path in (run / "sft", run / "sft" / "final", run / "sft" / "checkpoints" / "step-00000002"):
        assert place_in_run(str(path)) == (run, "sft")
    assert place_in_run(str(run)) == (run, "more")
    assert place_in_run(str(run / "base")) == (run, "base")
    assert place_in_run(str(pipeline_folder())) is None
    assert place_in_run("stabilityai/stable-diffusion-3.5-medium") is None


def test_a_run_without_an_evaluation_knows_the_size_of_its_images(tmp_path):
    made = recipe(stage("sft", train=SHORT))
    prompts = (
        HEAD + "stages:\n" + stage("a", "{type: flow_grpo, group_size: 2}", train=SHORT, rewards="shapes")
    )
    prompts = prompts.replace(
        "{type: shapes, images: 10, seed: 1}", "{prompts: {type: shapes, count: 3}, resolution: 24}"
    )
    for folder, text in (("images", made), ("prompts", parse_recipe(prompts, "p.yaml"))):
        from posttrain.recipe.file import dump_recipe

        name = text.stages[0].name
        (tmp_path / folder / name / "final").mkdir(parents=True)
        (tmp_path / folder / name / "recipe.yaml").write_text(dump_recipe(text))
    of_prompts, _ = settled(sources_of(str(tmp_path / "prompts" / "a")), ["resolution", "steps"])
    assert of_prompts == {"resolution": 24, "steps": 40}
    of_images, lines = settled(sources_of(str(tmp_path / "images" / "sft")), ["resolution"])
    assert lines == ["from posttrain's defaults: resolution 512"]
    assert of_images == {"resolution": 512}


def test_a_model_knows_the_size_of_its_images(tmp_path):
    assert usual_settings("posttrain/tiny-sd3") == {"resolution": 64}
    assert discover(Model, "posttrain.models")["tiny_sd3"]().native_side() == 64
    assert (
        side_of(
            {"transformer": {"sample_size": 128}, "vae": {"block_out_channels": [1, 2, 3, 4]}}, "transformer"
        )
        == 1024
    )
    assert side_of({"transformer": {}, "vae": {"sample_size": 768}}, "transformer") == 768
    assert side_of({}, "unet") is None
    made = discover(Model, "posttrain.models")["sdxl"](path=str(tmp_path))
    assert made.native_side() is None
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": 96}')
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [1, 2, 3, 4]}')
    assert made.native_side() == 768


def test_eval_takes_what_is_not_given_from_the_recipe_of_the_run(run, tmp_path):
    settings, lines = settled_evaluation(str(run / "sft"), Asked(overrides=("seed=3", "prompts.count=4")))
    assert (settings.resolution, settings.steps, settings.guidance, settings.seed) == (16, 2, 2, 3)
    assert (settings.prompts.count, settings.keep, [r.type for r in settings.rewards]) == (
        4,
        "png",
        ["shapes"],
    )
    assert lines == [
        "from the command line: prompts (4 of Shapes), seed 3",
        f"from the recipe of {run / 'sft'}: rewards shapes, resolution 16, steps 2, guidance 2, solver euler, "
        "precision fp32, images per prompt 1",
    ]
    (tmp_path / "p.txt").write_text("a red circle\n")
    file = str(tmp_path / "p.txt")
    other, lines = settled_evaluation(
        "posttrain/tiny-sd3", Asked(prompts=file, rewards=("jpeg_compressibility",))
    )
    assert (other.resolution, other.steps) == (64, 40)
    assert lines[1:] == [
        "from the model: resolution 64",
        "from posttrain's defaults: steps 40, guidance 4.5, solver euler, precision fp32, seed 0, images per prompt 1",
    ]
    with pytest.raises(RecipeError, match="say what to evaluate"):
        settled_evaluation("posttrain/tiny-sd3", Asked())
    like, lines = settled_evaluation(str(run), Asked(like="quickstart"))
    assert like.steps == 12
    assert lines[1].startswith(
        "from the recipe quickstart: prompts (480 of Shapes), rewards shapes, resolution 64"
    )


def test_a_suite_has_its_published_settings_whatever_the_run_has(run, tmp_path, monkeypatch):
    (tmp_path / "data" / "ocr").mkdir(parents=True)
    (tmp_path / "data" / "ocr" / "test.txt").write_text('a sign "a"\n')
    monkeypatch.chdir(tmp_path)
    settings, lines = settled_evaluation(str(run), Asked(suite="ocr"))
    assert (settings.resolution, settings.steps, settings.guidance) == (512, 40, 4.5)
    assert lines[1].startswith("from the suite ocr: ")


def test_the_folders_of_stages_and_runs_stand_for_their_weights(run):
    for path in (run / "more", run / "more" / "final", run):
        model, weights = open_artifact(str(path), CPU)
        assert weights == "ema"
        ours = next(model.transformer.parameters())
    theirs = next(open_artifact(str(run / "sft"), CPU)[0].transformer.parameters())
    base, weights = open_artifact(str(run / "base"), CPU)
    assert weights == "base"
    assert not torch.equal(ours, theirs)
    assert torch.equal(
        next(base.transformer.parameters()),
        next(open_artifact(str(pipeline_folder()), CPU)[0].transformer.parameters()),
    )


@pytest.mark.parametrize("end", ["", "/more", "/more/final"])
def test_recipes_take_the_folder_of_a_stage_or_a_run(run, tmp_path, end):
    path = f"{run}{end}"
    grpo = stage(
        "rl",
        "{type: flow_grpo, group_size: 2, beta: 0.1}",
        train=SHORT,
        rewards="shapes",
        start_from=path,
        reference=path,
    )
    grpo = grpo.replace(
        "{type: shapes, images: 10, seed: 1}", "{prompts: {type: shapes, count: 3}, resolution: 16}"
    )
    made = recipe(grpo)  # which checks files
    assert sources(made, path, tmp_path) == [run / "more" / "final"]
    told = [f"{run} is a run: its last finished stage is more"] if not end else []
    assert runs_named(made) == told
    later = parse_recipe(HEAD.replace(str(pipeline_folder()), path) + "stages:\n" + stage("sft"), "r.yaml")
    assert later.model.missing() is None
    assert runs_named(later) == told
    assert pinned(later.model).path == (f"{run}/more" if not end else path)


def test_a_run_without_a_finished_stage_is_refused(run, tmp_path):
    folder = tmp_path / "unfinished"
    (folder / "sft" / "checkpoints" / "step-00000003").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"stages": [{"name": "base"}, {"name": "sft"}]}))
    assert last_stage(folder) is None
    with pytest.raises(
        ModelError, match=r"no stage of the run .* is finished; give a checkpoint, such as .*step-00000003'"
    ):
        open_artifact(str(folder), CPU)
    with pytest.raises(RecipeError, match="is a run of which no stage is finished"):
        recipe(stage("sft", start_from=str(folder)))
    (folder / "sft" / "final").mkdir()
    (folder / "sft" / "stage.json").write_text("{}")
    assert weights_folder(folder) == folder / "sft" / "final"
    assert meaning_of(folder) == f"{folder} is a run: its last finished stage is sft"
    assert meaning_of(folder / "sft") is None


def test_weights_of_another_family_are_refused_before_anything_is_loaded(tmp_path):
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"")
    about = lora / "posttrain.json"
    about.write_text(json.dumps({"model": {"type": "flux", "path": "x"}}))
    with pytest.raises(RecipeError, match=r"stages\.0\.start_from .*model type 'flux', not of 'sd3'"):
        recipe(stage("one", start_from=str(lora)))
    for others in ({"model": {"type": "sd3"}}, {"model": 3}, {}):
        about.write_text(json.dumps(others))
        recipe(stage("one", start_from=str(lora)))
    about.unlink()
    recipe(stage("one", start_from=str(lora)))


def test_prompts_of_a_recipe_that_are_gone_are_asked_for(run, tmp_path):
    folder = tmp_path / "moved"
    (folder / "sft" / "final").mkdir(parents=True)
    text = (run / "sft" / "recipe.yaml").read_text()
    start, end = text.index("  prompts:\n"), text.index("  rewards:\n", text.index("evaluation:"))
    start = text.index("  prompts:\n", text.index("evaluation:"))
    (folder / "sft" / "recipe.yaml").write_text(f"{text[:start]}  prompts: gone.txt\n{text[end:]}")
    with pytest.raises(
        PosttrainError, match=r"the prompts of the recipe of .*gone\.txt.*give some: --prompt"
    ):
        drawn(folder / "sft", tmp_path / "out")


def test_a_recipe_that_cannot_be_read_is_named_where_defaults_stand_in_for_it(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for file in (copy / "recipe.yaml", copy / "more" / "recipe.yaml"):
        text = file.read_text("utf-8")
        assert "type: sft" in text
        file.write_text(text.replace("type: sft", "type: nowhere:Mine"), "utf-8")
    lines = drawn(copy / "more", tmp_path / "images", ["a circle"], steps=1)[1]
    (line,) = [line for line in lines if "posttrain's defaults" in line]
    assert line.startswith("from posttrain's defaults (no recipe could be read: ")
    assert "cannot load the algorithm 'nowhere:Mine': no module 'nowhere'" in line
