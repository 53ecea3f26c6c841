"""``posttrain plan`` prints what a recipe needs, and reads what benchmarks measured."""

import io
import json
import runpy
import sys
from pathlib import Path

import pytest
from forked import finished, posttrain
from rich.console import Console
from typer import BadParameter

from posttrain.cli.options import number
from posttrain.cli.plan import _measured
from posttrain.errors import PosttrainError
from posttrain.planning.budget import Budget
from posttrain.planning.gpus import custom, gpu
from posttrain.planning.tables import resources
from posttrain.recipe.file import load_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Counts that a plan keeps go to a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def test_gpus_are_known_by_the_names_people_write():
    assert gpu("NVIDIA H100 80GB HBM3").flops == 989e12
    assert gpu("rtx 4090").memory_bytes == 24e9
    assert [gpu(name).name for name in ("L4", "RTX 4070", "h100")] == [
        "L4 24GB",
        "RTX 4070 12GB",
        "H100 80GB",
    ]
    assert (gpu("rtx 4060").memory_bytes, gpu("RTX 4070 Ti").memory_bytes) == (8e9, 12e9)
    with pytest.raises(PosttrainError, match="one of 'A100 80GB', 'A100 40GB'"):
        gpu("a100")
    with pytest.raises(PosttrainError, match=r"did you mean 'H200 141GB'.*--memory 48GB --tflops 362"):
        gpu("H200 14GB")
    assert [custom(text, 1).memory_bytes for text in ("60MB", "48", "44.5 GiB")] == [60e6, 48e9, 44.5 * 2**30]
    with pytest.raises(PosttrainError, match="no size"):
        custom("lots", 100)


def test_the_command_plans_a_shipped_recipe_without_weights_or_data(tmp_path):
    out = posttrain("plan", "sd35m-soar", "--gpu", "H100 80GB", "--gpus", "8", cwd=tmp_path).stdout
    assert "8 x H100 80GB" in out
    assert "does not fit" not in out
    for word in ("weights", "gradients", "optimizer", "roles", "activations", "caches", "GPU-hours", "disk"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_command_says_what_does_not_fit_and_what_would(tmp_path):
    out = posttrain("plan", "sd35m-soar", "--memory", "48GB", "--tflops", "362", cwd=tmp_path).stdout
    assert "soar does not fit" in out
    assert "It would with one of:" in out
    assert "    --set cache.prompts=true\n" in out
    assert "    --set stages.soar.train.optimizer=adamw8bit\n" in out
    assert "text encoders and VAE travel for each batch" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "H1000"), "did you mean"),
        (("--memory", "48GB"), "--tflops"),
        (("--gpu", "h100", "--mfu", "0.5", "--measured", "x.json"), "give one of them"),
        (("--gpu", "h100", "--measured", "none.json"), "no result of a benchmark"),
        (
            ("--gpu", "h100", "--gpus", "2", "--set", "parallel.strategy=single"),
            "single is one process, not 2",
        ),
        (("--gpu", "h100", "--set", "parallel.strategy=magic"), "magic"),
    ],
)
def test_mistakes_are_one_clear_error(tmp_path, arguments, words):
    done = posttrain("plan", "quickstart", *arguments, cwd=tmp_path, code=1)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_nan_is_no_number_of_an_option():
    # some versions of typer only compare it with the bounds, and no comparison with NaN is true
    with pytest.raises(BadParameter, match="nan is no number"):
        number(float("nan"))
    assert (number(0.5), number(None)) == (0.5, None)


MORE = [pytest.param(name, marks=pytest.mark.matrix) for name in ("sft_step", "nft_iteration", "evaluation")]


@pytest.mark.parametrize("name", ["soar_step", "grpo_iteration", *MORE])
def test_every_benchmark_runs_and_its_figures_are_read_by_the_plan(tmp_path, name):
    extra = {"evaluation": ["--images", "2", "--steps", "2"], "soar_step": ["--points", "1"]}
    small = ["--steps", "2", "--group", "2"] if name.endswith("iteration") else extra.get(name, [])
    file = str(ROOT / "benchmarks" / f"{name}.py")

    def program():
        sys.argv = [file, "--batch", "2", "--rounds", "1", *small, "--output", "b.json"]
        sys.path.insert(0, str(ROOT / "benchmarks"))
        runpy.run_path(file, run_name="__main__")

    done = finished(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["engine"]["mfu"] > 0


def test_a_measured_mfu_is_used(tmp_path):
    (tmp_path / "b.json").write_text('{"engine": {"mfu": 0.5}}')
    out = posttrain("plan", "quickstart", "--gpu", "h100", "--measured", "b.json", cwd=tmp_path).stdout
    assert "MFU of 50%" in out
    assert "measured, b.json" in out


def test_a_plan_is_as_wide_as_the_terminal():
    recipe = load_recipe(
        "quickstart-rl", ["stages.0.train.micro_batch=auto", "cache.prompts=true"], checks=False
    )
    plan = resources(recipe, Budget(custom("60MB", 1), 8), cuda=True)
    for width in (80, 120):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        with console.capture() as shown:
            console.print(plan)
        text = shown.get()
        for words in (
            "auto is planned as micro_batch",
            "cache: its size is at most",
            "It would with",
            "host",
        ):
            assert words in text
        assert "…" not in text
        assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("mfu", ["0", "-1", "NaN", "Infinity"])
def test_a_measured_mfu_that_is_no_speed_is_refused(tmp_path, mfu):
    (tmp_path / "b.json").write_text(f'{{"engine": {{"mfu": {mfu}}}}}')
    with pytest.raises(PosttrainError, match=r"no result of a benchmark: its engine\.mfu is"):
        _measured(tmp_path / "b.json")
