"""The command line does what it says, quickly, and fails in one clear line."""

import json
import os
import subprocess
import sys

import pytest
from forked import ROOT, posttrain
from runs import EVALUATION, HEAD, recipe, run_quietly, stage


def test_help_needs_no_torch():
    command = [sys.executable, "-m", "posttrain", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("run", "check", "recipes", "eval", "sample", "shapes", "rewards", "score", "serve-reward"):
        assert word in done.stdout
    probe = "import sys; sys.argv = ['posttrain', '--help']\nimport posttrain.cli.app as c\ntry: c.app()\nexcept SystemExit: pass\nprint([m for m in ('torch', 'pydantic', 'diffusers') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT).stdout
    assert loaded.strip().endswith("[]")


def test_check_loads_no_model_library(tmp_path):
    (tmp_path / "r.yaml").write_text(HEAD + "stages:\n" + stage("sft"))
    probe = "import sys\nfrom posttrain.recipe.file import load_recipe\nfrom posttrain.planning.overview import overview\noverview(load_recipe('r.yaml'))\nprint([m for m in ('diffusers', 'transformers', 'peft', 'tensorboard') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_check_prints_the_plan(tmp_path):
    soar = stage("soar", "{type: soar}", start_from="base")
    (tmp_path / "r.yaml").write_text(HEAD + "stages:\n" + stage("sft") + soar + EVALUATION)
    lines = posttrain("check", "r.yaml", cwd=tmp_path).stdout.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("soar "))
    # 6 steps of 4 samples of 7 items; 23 forward-equivalents a sample
    assert row[1:6] == ["base", "soar", "6", "24", "168"]
    assert row[7] == str(24 * 23)


def test_a_faulty_recipe_is_one_line_and_no_traceback(tmp_path):
    (tmp_path / "r.yaml").write_text(HEAD + "stages:\n" + stage("sft").replace("sft}", "sfft}"))
    done = posttrain("run", "r.yaml", cwd=tmp_path, code=1)
    assert "error: r.yaml:" in done.stderr
    assert "did you mean 'sft'" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in posttrain("run", "r.yaml", "--debug", cwd=tmp_path, code=1).stderr


def test_check_data_lists_every_bad_image(tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    rows = [{"image": "good.png", "caption": "a"}] * 5 + [{"image": "cut.png", "caption": "b"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    data = "{images: t.jsonl, resolution: 16, tolerance: TOLERANCE}"
    text = HEAD + "stages:\n" + stage("sft").replace("{type: shapes, images: 10, seed: 1}", data)
    (tmp_path / "strict.yaml").write_text(text.replace("TOLERANCE", "0.1"))
    done = posttrain("check", "strict.yaml", "--data", cwd=tmp_path, code=1)
    assert "t.jsonl:6: " in done.stdout
    assert "t.jsonl:7: " in done.stdout
    assert "2 of 7 rows" in done.stderr
    (tmp_path / "lenient.yaml").write_text(text.replace("TOLERANCE", "0.5"))
    assert "7 rows, 2 of them bad" in posttrain("check", "lenient.yaml", "--data", cwd=tmp_path).stdout


def test_recipes_are_listed_shown_and_copied(tmp_path):
    listed = posttrain("recipes", cwd=tmp_path).stdout
    assert "quickstart" in listed
    assert "sd35m-soar-lora" in listed
    shown = posttrain("recipes", "show", "sd35m-soar", cwd=tmp_path).stdout
    assert "trajectory_length: 6" in shown
    posttrain("recipes", "copy", "sd35m-soar", cwd=tmp_path)
    assert (tmp_path / "sd35m-soar.yaml").read_text() == shown
    assert "exists" in posttrain("recipes", "copy", "sd35m-soar", cwd=tmp_path, code=1).stderr
    told = posttrain("recipes", "copy", "sd35m-soar", "my own.yaml", cwd=tmp_path).stdout
    assert told == "wrote my own.yaml; run it with: posttrain run 'my own.yaml'\n"
    assert (
        "did you mean 'sd35m-soar'" in posttrain("recipes", "show", "sd35-soar", cwd=tmp_path, code=1).stderr
    )


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "small"
    lora = stage("lora", "{type: soar, trajectory_length: 1}", tune="{type: lora, rank: 2}")
    run_quietly(recipe(stage("sft"), lora), folder)
    return folder


@pytest.mark.parametrize("name", ["sft", "lora"])
def test_eval_scores_full_and_lora_artifacts(stages, tmp_path, name):
    (tmp_path / "p.jsonl").write_text(
        '{"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}\n'
    )
    settings = ("--set", "resolution=16", "--set", "steps=2", "--set", "images_per_prompt=3")
    arguments = (
        "eval",
        stages / name,
        "--prompts",
        "p.jsonl",
        "--reward",
        "shapes",
        *settings,
        "--output",
        "out",
    )
    done = posttrain(*arguments, cwd=tmp_path)
    assert "single_object" in done.stdout
    summary = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert summary["images"] == 3
    assert summary["model"]["weights"] == "ema"
    assert len((tmp_path / "out" / "records.jsonl").read_text().splitlines()) == 3
    assert "nothing is sampled" not in done.stdout
    again = posttrain(*arguments, cwd=tmp_path).stdout
    assert "out: was finished before, so nothing is sampled; to sample again, remove it\n" in again
    assert again.endswith(done.stdout[done.stdout.index("out\n") :])


@pytest.mark.parametrize(
    "command",
    [
        ("run", "quickstart", "--output"),
        ("run", "quickstart", "--smoke", "--output"),
        ("eval", "posttrain/tiny-sd3", "--like", "quickstart", "--output"),
        ("sample", "posttrain/tiny-sd3", "--prompt", "x", "--output"),
        ("shapes", "build"),
        ("export", "STAGE", "--to"),
    ],
)
def test_a_file_where_a_folder_is_to_be_is_said_in_words(stages, tmp_path, command):
    (tmp_path / "taken").touch()
    words = [stages / "sft" if word == "STAGE" else word for word in command]
    for place in ("taken", "taken/below"):
        told = posttrain(*words, place, cwd=tmp_path, code=1).stderr
        assert "taken' is a file, a folder is expected" in told
        assert "Errno" not in told


@pytest.mark.parametrize(
    "command",
    [
        ("schema",),
        ("report", "STAGE/.."),
        ("score", "IMAGES", "--prompt", "x", "--reward", "jpeg_compressibility"),
    ],
)
def test_a_folder_where_a_file_is_to_be_is_said_in_words(stages, tmp_path, command):
    from PIL import Image

    (tmp_path / "taken").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a.png")
    places = {"STAGE/..": stages, "IMAGES": "images"}
    told = posttrain(*(places.get(word, word) for word in command), "--output", "taken", cwd=tmp_path, code=1)
    assert told.stderr == "error: cannot write 'taken': it is a folder, a file is expected\n"


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("mine", "no recipe 'mine': neither a file here nor shipped (did you mean 'mine.yaml'?)"),
        ("mien", "neither a file here nor shipped (did you mean 'mine.yaml'?)"),
        ("mine.yml", "no file 'mine.yml' (did you mean 'mine.yaml'?)"),
        ("own/mine", "no file 'own/mine' (did you mean 'own/mine.yaml'?)"),
        ("quickstrat", "neither a file here nor shipped (did you mean 'quickstart'?)"),
        ("far/mine.yaml", "cannot read far/mine.yaml: No such file"),
    ],
)
def test_the_file_that_was_meant_is_named(tmp_path, named, words):
    (tmp_path / "own").mkdir()
    for file in ("mine.yaml", "own/mine.yaml"):
        (tmp_path / file).touch()
    told = posttrain("check", named, cwd=tmp_path, code=1).stderr
    assert told.startswith("error: ")
    assert words in told


def test_sample_writes_images_and_a_grid(stages, tmp_path):
    from PIL import Image

    arguments = (
        "--prompt",
        "a red circle",
        "--prompt",
        "a blue square",
        "--images",
        "2",
        "--resolution",
        "16",
    )
    posttrain("sample", stages / "sft" / "final", *arguments, "--steps", "2", "--output", "out", cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000-00.png", "000-01.png", "001-00.png", "001-01.png", "grid.png",
    ]  # fmt: skip
    assert Image.open(tmp_path / "out" / "000-00.png").size == (16, 16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "./nowhere", "--prompt", "x"), "does not exist"),
        (("sample", "posttrain/huge", "--prompt", "x"), "comes with posttrain"),
        (("sample", "some/model", "--prompt", "x"), "local folder"),
        (
            ("sample", "posttrain/tiny-sd3", "--prompt", "x", "--resolution", "512"),
            "512 x 512 px is too large",
        ),
        (
            ("sample", "posttrain/tiny-sd3"),
            "say what to draw: --prompt TEXT; no recipe of a run gives prompts",
        ),
        (("eval", "./nowhere", "--prompts", "p.txt", "--reward", "shapes"), "no file 'p.txt'"),
        (("eval", "./nowhere"), "say what to evaluate"),
        (
            ("eval", "./nowhere", "--prompts", "p.txt", "--reward", "nice"),
            "evaluation: rewards.0.type: no type",
        ),
        (("run", "nowhere.yaml"), "No such file"),
        (("shapes", "build", "out", "--style", "wild"), "no style 'wild'"),
    ],
)
def test_mistakes_on_the_command_line_are_one_clear_error(tmp_path, arguments, words):
    done = posttrain(*arguments, cwd=tmp_path, code=1)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [("eval", "--like", "quickstart"), ("sample", "--prompt", "x")])
@pytest.mark.parametrize("model", ["./nowhere", "posttrain/huge", "."])
def test_an_error_of_a_model_names_no_field_of_a_recipe(tmp_path, command, model):
    done = posttrain(command[0], model, *command[1:], cwd=tmp_path, code=1)
    assert "model.path" not in done.stderr
    assert done.stderr.startswith(
        ("error: the folder '", "error: no model 'posttrain/huge' comes", f"error: '{tmp_path}")
    )


def test_shapes_build_writes_the_published_format(tmp_path):
    posttrain("shapes", "build", "out", "--images", "12", "--seed", "3", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert set(rows[0]) == {"md5", "caption_en", "bw", "bh"}
    assert all((tmp_path / "out" / "images" / f"{row['md5']}.jpg").is_file() for row in rows)


def test_the_report_of_a_run_is_written_again_and_one_of_several_beside_the_first(stages, tmp_path):
    import shutil

    for name in ("a", "b"):
        shutil.copytree(
            stages, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("checkpoints", "final")
        )
    (tmp_path / "runs" / "a" / "report.html").unlink()
    done = posttrain("report", "runs/a", cwd=tmp_path)
    assert done.stdout == "report: runs/a/report.html\n"
    assert "sft" in (tmp_path / "runs" / "a" / "report.html").read_text()
    assert posttrain("report", "runs/a", "runs/b", cwd=tmp_path).stdout == "report: runs/report.html\n"
    whole = tmp_path / "runs"
    assert posttrain("report", whole / "a", "runs/b", cwd=tmp_path).stdout == f"report: {whole}/report.html\n"
    assert posttrain("report", ".", "../b", cwd=whole / "a").stdout == f"report: {whole}/report.html\n"
    posttrain("report", "runs/a", "runs/b", "--output", "both.html", cwd=tmp_path)
    page = (tmp_path / "both.html").read_text()
    assert "a/sft" in page
    assert "b/lora" in page
    assert "holds no run" in posttrain("report", "runs", cwd=tmp_path, code=1).stderr
