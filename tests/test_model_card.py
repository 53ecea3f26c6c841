"""Every stage's final/ has a model card, which an export takes along and a hub understands."""

import json
import re
import shutil

import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from pipelines import pipeline_folder
from runs import EVALUATION, TRAIN, recipe, run_quietly, stage
from typer.testing import CliRunner

from posttrain.cli.app import app
from posttrain.models._licences import origin_of
from posttrain.recipe.file import dump_recipe, parse_recipe
from posttrain.stages.model_card import card_text, grid_image

SHORT = TRAIN.replace("steps: 6", "steps: 2")
LORA = "{type: lora, rank: 2}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of full fine-tuning, a LoRA on top, and another LoRA on top of that; evaluated."""
    folder = tmp_path_factory.mktemp("cards") / "small"
    stages = (
        stage("full", train=SHORT),
        stage("one", train=SHORT, tune=LORA),
        stage("two", train=SHORT, tune=LORA),
    )
    run_quietly(recipe(*stages, evaluation=EVALUATION), folder)
    return folder


def card(folder):
    return ModelCard((folder / "README.md").read_text())


def test_a_card_says_what_the_weights_are_and_how_they_score(run):
    found, scores = (
        card(run / "two" / "final"),
        json.loads((run / "two" / "evaluation" / "eval.json").read_text())["scores"],
    )
    data = found.data.to_dict()
    assert data == {
        "library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["posttrain", "sd3", "sft", "lora"]
    }  # fmt: skip
    mean = scores["shapes"]
    assert f"| {mean['mean']:.4g} [{mean['low']:.4g}, {mean['high']:.4g}] |" in found.text
    assert "| two | one | sft | LoRA, rank 2, alpha 2 | 2 |" in found.text
    assert "6 images of 6 prompts (shapes), 16 px, 2 steps, guidance 2" in found.text
    assert "on top of the weights of `full`: load those first" in found.text
    assert "pipeline.set_adapters(['one', 'two'])" in found.text
    assert "![Images of the evaluation](grid.png)" in found.text
    with Image.open(run / "two" / "final" / "grid.png") as grid:
        assert grid.width > grid.height / 2 > 64
    assert "full" in card(run / "full" / "final").data.tags
    assert "load_lora_weights" not in card(run / "full" / "final").text


def test_the_recipe_of_a_card_is_the_recipe(run):
    text = re.search(r"```yaml\n(.*?)\n```", (run / "one" / "final" / "README.md").read_text(), re.S)[1]
    assert parse_recipe(text, "card").stages == recipe(
        *(stage(n, train=SHORT, **({} if n == "full" else {"tune": LORA})) for n in ("full", "one", "two")), evaluation=EVALUATION
    ).stages  # fmt: skip


def test_the_card_of_an_export_names_all_loras_that_it_joins(run):
    from posttrain.stages.model_card import card_text

    joined, alone = card_text(run, "two", "kohya", "two"), card_text(run, "one", "kohya", "one")
    assert "The LoRAs of `one` and `two`, joined into one, of `" in joined
    assert "A LoRA of rank 2 of `" in alone
    assert "set_adapters" not in joined


def test_the_card_of_a_damaged_evaluation_does_not_say_that_there_was_none(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "full" / "evaluation" / "eval.json"
    file.write_text("{")
    assert "evaluated, but the file of its scores, eval.json, is damaged." in card_text(copy, "full")
    file.unlink()
    assert "This stage was not evaluated." in card_text(copy, "full")


def test_images_of_a_card_stand_with_their_prompts_and_one_that_is_damaged_is_left_out(
    run, tmp_path, monkeypatch
):
    copy, drawn = shutil.copytree(run, tmp_path / "run"), []
    monkeypatch.setattr(
        "posttrain.support.images.grid", lambda images, columns, captions: drawn.append((images, captions))
    )
    folder = copy / "full" / "evaluation"
    second = np.asarray(Image.open(folder / "grid" / "001.png")) / 255
    prompts = json.loads((folder / "eval.json").read_text())["grid_prompts"]
    (folder / "grid" / "000.png").unlink()
    (copy / "base" / "evaluation" / "grid" / "000.png").write_bytes(b"torn")
    grid_image(copy, "full")
    (images, captions), *_ = drawn
    assert captions == [f"base: {prompts[1]}", f"full: {prompts[1]}"]
    assert images[1].permute(1, 2, 0).numpy() == pytest.approx(second)


def test_a_card_is_there_before_the_evaluation_and_stays_as_it_is(run, tmp_path):
    run_quietly(recipe(stage("full", train=SHORT)), tmp_path / "run")
    assert "This stage was not evaluated." in card(tmp_path / "run" / "full" / "final").text
    files = [run / "two" / "final" / name for name in ("README.md", "grid.png")]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    stages = (
        stage("full", train=SHORT),
        stage("one", train=SHORT, tune=LORA),
        stage("two", train=SHORT, tune=LORA),
    )
    run_quietly(recipe(*stages, evaluation=EVALUATION), run)
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before


def test_a_card_has_no_password_of_a_reward_server(run, tmp_path):
    shutil.copytree(run / "full", tmp_path / "full")
    file = tmp_path / "full" / "recipe.yaml"
    remote = "evaluation.rewards=[{type: remote, url: 'http://me:secret@host:8400', name: mine}]"
    file.write_text(dump_recipe(parse_recipe(file.read_text(), "card", [remote], checks=False)))
    text = card_text(tmp_path, "full")
    assert "url: http://host:8400" in text
    assert "secret" not in text


def test_base_and_licence_are_told_where_they_are_known(tmp_path):
    for kind in ("medium", "large", "large-turbo"):
        name = f"stabilityai/stable-diffusion-3.5-{kind}"
        assert origin_of(name) == {
            "base_model": name,
            "license": "other",
            "license_name": "stabilityai-ai-community",
            "license_link": f"https://huggingface.co/{name}/blob/main/LICENSE.md",
        }
    assert origin_of("posttrain/tiny-sd3") == {"license": "apache-2.0"}
    assert origin_of("some/model") == {"base_model": "some/model"}
    assert origin_of(str(tmp_path)) == origin_of(str(pipeline_folder())) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: some/model\ntags: [a]\n---\n# x\n")
    assert origin_of(str(tmp_path)) == {"base_model": "some/model", "license": "mit"}
    (tmp_path / "README.md").write_text("---\n[: broken\n---\n")
    assert origin_of(str(tmp_path)) == {}


def exported(*arguments, code=0):
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if code == 0:
        assert done.exit_code == 0, done.exception
    return done


def test_the_command_exports_with_a_card_and_says_where(run, tmp_path):
    done = exported(run / "one", "--to", tmp_path / "k", "--format", "kohya", "--dtype", "bf16")
    assert (
        re.sub(r"\s+", " ", done.output)
        == f"wrote {run}/one as kohya to {tmp_path}/k/small-one-kohya.safetensors "
    )
    text = card(tmp_path / "k").text
    assert "`small-one-kohya.safetensors` is for kohya's scripts, at strength 1." in text
    assert "posttrain export runs/small/one --to DIR --format kohya --dtype bf16" in text
    assert "library_name" not in card(tmp_path / "k").data.to_dict()
    assert (tmp_path / "k" / "grid.png").read_bytes() == (run / "one" / "final" / "grid.png").read_bytes()
    for arguments, words in (
        (["--format", "koya"], "--format: 'koya' is none of diffusers, merged, lora, comfyui, kohya"),
        (["--dtype", "fp8"], "--dtype: 'fp8' is none of fp32, bf16, fp16"),
        (["--public"], "--public is for --push-to-hub"),
    ):
        assert words in str(exported(run / "one", "--to", tmp_path / "x", *arguments, code=1).exception)
    assert not (tmp_path / "x").exists()


def test_a_merged_lora_is_no_lora_any_more(run):
    text = card_text(run, "two", "merged")
    assert "A LoRA, merged into its base, of" in text
    assert "load_lora_weights" not in text
    assert {"full"} < set(ModelCard(text).data.tags)
    assert "set_adapters" not in card_text(run, "two", "lora"), "the exported file holds both"


class FakeHub:
    """In place of the hub: notes what HfApi is asked for."""

    def __init__(self, monkeypatch, status=None):
        self.asked, self.removed = [], None

        def create_repo(api, repo_id, **options):
            self.asked.append((repo_id, options))
            if status is not None:
                response = type("Response", (), {"status_code": status, "headers": {}, "request": None})()
                raise HfHubHTTPError("refused", response=response)
            return type("Made", (str,), {"repo_id": f"me/{repo_id}"})(f"https://hub/me/{repo_id}")

        def upload_folder(api, *, repo_id, folder_path, ignore_patterns, **options):
            files = sorted(
                p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()
            )
            self.asked.append((repo_id, [f for f in files if f not in ignore_patterns]))
            self.removed = options["delete_patterns"]

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)


def test_an_export_is_pushed_to_a_private_repository(run, tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch)
    done = exported(run / "one", "--to", tmp_path / "x", "--push-to-hub", "mine")
    assert hub.asked[0][0] == "mine"
    assert (hub.asked[0][1]["private"], hub.asked[0][1]["exist_ok"]) == (True, False)
    assert hub.asked[1] == ("me/mine", ["README.md", "grid.png", "pytorch_lora_weights.safetensors"])
    assert hub.removed is None
    assert "uploaded to https://hub/me/mine" in done.output.replace("\n", "")
    exported(run / "one", "--to", tmp_path / "x", "--push-to-hub", "mine", "--public", "--overwrite")
    assert (hub.asked[2][1]["private"], hub.asked[2][1]["exist_ok"]) == (False, True)
    assert hub.removed == ["*-of-?????.safetensors", "*.safetensors.index.json"], "diffusers would load them"


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "hf auth login"), (409, "it exists: give another name, or --overwrite"), (500, "refused")],
)
def test_what_the_hub_refuses_is_one_clear_error(run, tmp_path, monkeypatch, status, words):
    FakeHub(monkeypatch, status)
    done = exported(run / "one", "--to", tmp_path / "x", "--push-to-hub", "mine", code=1)
    assert words in str(done.exception)
    assert "the export is complete in" in str(done.exception)
    assert (tmp_path / "x" / "README.md").is_file()
