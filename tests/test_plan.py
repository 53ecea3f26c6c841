"""Does the plan know what a recipe needs, and what to change where it does not fit?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import posttrain

from posttrain.algorithm import Algorithm
from posttrain.errors import PosttrainError
from posttrain.models._published import PUBLISHED
from posttrain.planning.counts import META, Counts
from posttrain.planning.gpus import custom, gpu
from posttrain.planning.memory import Phase, Sizes, memory
from posttrain.planning.needs import Spread, side_of, stage_needs
from posttrain.planning.rehearsal import rehearse
from posttrain.planning.remedies import remedies
from posttrain.planning.report import Budget
from posttrain.recipe_file import load_recipe, parse_recipe
from posttrain.spec import discover

ROOT = Path(__file__).parent.parent
ALGORITHMS = sorted(discover(Algorithm, "posttrain.algorithms"))
PROMPTS = "{prompts: {type: shapes, count: 24}, resolution: 64}"
CASES = {
    "sft": ("{type: sft}", "{type: shapes, images: 40}", ""),
    "soar": ("{type: soar}", "{type: shapes, images: 40}", ""),
    "flow_grpo": ("{type: flow_grpo, group_size: 4, num_steps: 3}", PROMPTS, "rewards: jpeg_compressibility"),
    "diffusion_nft": (
        "{type: diffusion_nft, group_size: 4, num_steps: 3}",
        PROMPTS,
        "rewards: jpeg_compressibility",
    ),
}


@pytest.fixture(scope="module")
def sd35m():
    """The counts of SD3.5 Medium at the 77 tokens of the published figures."""
    return Counts(load_recipe("sd35m-soar", ["model.max_sequence_length=77"], checks=False).model, cuda=True)


def test_the_published_shape_has_the_published_number_of_weights(sd35m):
    outline = sd35m.outline()
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(outline.transformer) == 2_243_171_520
    assert count(outline.vae) == 83_819_683
    encoders = [count(e) for e in outline._text_encoders()]
    assert encoders == [123_650_304, 694_659_840, 4_762_310_656]
    assert set(PUBLISHED["stabilityai/stable-diffusion-3.5-medium"]) >= {"transformer", "vae", "scheduler"}


def test_a_forward_of_sd35m_at_512_px_is_about_2_1_tflop(sd35m):
    assert sd35m.flops("forward", 512) == pytest.approx(2.1e12, rel=0.03)


def test_a_soar_step_of_sd35m_with_6_points_is_about_48_tflop_a_sample(sd35m):
    calls = rehearse(Algorithm.variants["soar"](trajectory_length=6))
    assert calls.forward_equivalents * sd35m.flops("forward", 512) == pytest.approx(48e12, rel=0.03)


def test_1000_steps_of_flow_grpo_on_ocr_are_63_gpu_hours_without_the_references_forwards(sd35m):
    stage = load_recipe("sd35m-grpo-ocr", checks=False).stages[0]
    samples = 1000 * stage.train.batch_size / stage.train.steps_per_batch
    hours = {
        beta: rehearse(stage.algorithm.model_copy(update={"beta": beta})).forward_equivalents
        * samples * sd35m.flops("forward", 512) / 400e12 / 3600
        for beta in (0.0, stage.algorithm.beta)
    }  # fmt: skip
    assert hours[0.0] == pytest.approx(63, rel=0.02)
    assert hours[stage.algorithm.beta] == pytest.approx(79, rel=0.02)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_costs_what_it_says(name):
    algorithm = Algorithm.variants[name]()
    calls = rehearse(algorithm)
    assert calls.forward_equivalents == algorithm.forward_equivalents_per_sample()
    assert calls.items == algorithm.items_per_sample()


def test_guidance_doubles_the_rows_of_a_forward_where_it_is_on():
    grpo = Algorithm.variants["flow_grpo"]
    assert rehearse(grpo()).rows_with == 2
    assert rehearse(grpo(guidance_scale=1.0)).rows_with == 1
    assert rehearse(Algorithm.variants["soar"]()).rows_without == 2


def planned(name, tune="{type: full}", train="micro_batch: 32"):
    algorithm, data, rewards = CASES[name]
    return parse_recipe(
        f"""
name: planned
tracker: none
device: cpu
model: {{type: sd3, path: posttrain/tiny-sd3, max_sequence_length: 16}}
stages:
  - name: only
    algorithm: {algorithm}
    data: {data}
    tune: {tune}
    {rewards}
    train: {{steps: 2, batch_size: 32, sample_every: null, {train}}}
""",
        "planned.yaml",
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident peak is reset by Linux only")
@pytest.mark.parametrize("tune", ["{type: full}", "{type: lora, rank: 8}"])
@pytest.mark.parametrize("name", list(CASES))
def test_the_estimate_is_within_15_percent_of_the_measured_peak(tmp_path, name, tune):
    from posttrain.recipe_file import dump_recipe

    recipe = planned(name, tune)
    estimate = stage_needs(recipe, recipe.stages[0], Counts(recipe.model, cuda=False), Spread()).memory.total
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [sys.executable, str(Path(__file__).parent / "measured_memory.py"), "r.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert estimate == pytest.approx(float(done.stdout.split()[-1]), rel=0.15)


def test_checkpointing_and_a_smaller_micro_batch_need_less():
    def total(train):
        recipe = planned("sft", train=train)
        needs = stage_needs(recipe, recipe.stages[0], Counts(recipe.model, cuda=False), Spread())
        return needs.memory.total, needs.training.full

    whole, less = total("micro_batch: 32"), total("micro_batch: 8")
    again = total("micro_batch: 32, gradient_checkpointing: full")
    assert less[0] < whole[0] / 2
    assert again[0] < whole[0] / 2
    assert again[1] == pytest.approx(whole[1] * 4 / 3)


SIZES = Sizes(trained=100, frozen=80, others=7, roles=400, block=10)


def test_sharding_divides_what_it_says():
    phases = {"training": Phase(50.0, 5.0)}
    whole = memory(SIZES, phases, world_size=4, strategy="ddp")
    assert whole.parts == {
        "weights": 487, "gradients": 400, "optimizer": 800, "roles": 400, "activations": 50, "caches": 5,
    }  # fmt: skip
    zero = [memory(SIZES, phases, strategy="deepspeed", zero_stage=s, world_size=4) for s in (1, 2, 3)]
    assert [m.optimizer for m in zero] == [200, 200, 200]
    assert [m.gradients for m in zero] == [400, 100, 100]
    assert [m.roles for m in zero] == [400, 400, 100]
    fsdp = memory(SIZES, phases, strategy="fsdp2", world_size=4)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer, fsdp.caches) == (127, 100, 200, 25)


def test_the_phase_that_needs_most_counts():
    first = {"training": Phase(500.0, gradients=False), "optimizer": Phase(0.0)}
    assert memory(SIZES, first).phase == "training"
    assert memory(SIZES, first).gradients == 0
    assert memory(SIZES, {**first, "training": Phase(300.0, gradients=False)}).phase == "optimizer"


def test_remedies_make_it_fit_and_the_cheapest_comes_first():
    recipe = planned("sft")
    counts = Counts(recipe.model, cuda=False)
    found = remedies(recipe, recipe.stages[0], counts, Spread(), 100e6)
    assert found[0].settings == ("--set stages.only.train.micro_batch=8",)
    assert all(remedy.needs.memory.total <= 100e6 for remedy in found)
    (least,) = remedies(recipe, recipe.stages[0], counts, Spread(), 1e6)
    assert least.needs.memory.total > 1e6


def test_gpus_are_known_by_the_names_people_write():
    assert gpu("NVIDIA H100 80GB HBM3").flops == 989e12
    assert gpu("rtx 4090").memory_bytes == 24e9
    with pytest.raises(PosttrainError, match="one of 'A100 80GB', 'A100 40GB'"):
        gpu("a100")
    with pytest.raises(PosttrainError, match=r"did you mean 'H200 141GB'.*--memory 48GB --tflops 362"):
        gpu("H200 14GB")
    with pytest.raises(PosttrainError, match="no size"):
        custom("lots", 100)


def test_time_is_work_over_what_the_devices_sustain():
    from posttrain.planning.needs import Work

    budget = Budget(gpu("h100"), Spread(8, "ddp"), 0.5, "given", tf32=True)
    assert budget.seconds(Work(low=989e12)) == pytest.approx(1 / 8 / 0.5)
    assert budget.seconds(Work(full=989e12)) == pytest.approx(2 / 8 / 0.5)


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
    assert "--set stages.soar.tune.type=lora" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "H1000"), "did you mean"),
        (("--memory", "48GB"), "--tflops"),
        (("--gpu", "h100", "--mfu", "0.5", "--measured", "x.json"), "give one of them"),
        (("--gpu", "h100", "--measured", "none.json"), "no result of a benchmark"),
        (("--gpu", "h100", "--strategy", "magic"), "none of"),
    ],
)
def test_mistakes_are_one_clear_error(tmp_path, arguments, words):
    done = posttrain("plan", "quickstart", *arguments, cwd=tmp_path, code=1)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


@pytest.mark.parametrize("name", ["soar_step", "sft_step", "grpo_iteration", "nft_iteration", "evaluation"])
def test_every_benchmark_runs_and_its_figures_are_read_by_the_plan(tmp_path, name):
    extra = {"evaluation": ["--images", "2", "--steps", "2"], "soar_step": ["--points", "1"]}
    small = ["--steps", "2", "--group", "2"] if name.endswith("iteration") else extra.get(name, [])
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / f"{name}.py"),
        "--batch",
        "2",
        "--rounds",
        "1",
        *small,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", "b.json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "times as fast" in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["engine"]["mfu"] > 0


def test_a_measured_mfu_is_used(tmp_path):
    (tmp_path / "b.json").write_text('{"engine": {"mfu": 0.5}}')
    out = posttrain("plan", "quickstart", "--gpu", "h100", "--measured", "b.json", cwd=tmp_path).stdout
    assert "MFU of 50%" in out
    assert "measured, b.json" in out


def test_every_shipped_recipe_can_be_planned_for():
    recipe = load_recipe("tiny-pretrain", checks=False)
    assert recipe.model.outline("fp32", META) is not None
    assert side_of(recipe.stages[0]) == 64
    assert torch.device("meta") == META
