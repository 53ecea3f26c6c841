"""The plan knows what a recipe needs, and what to change where it does not fit."""

import io
import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import finished, posttrain
from rich.console import Console

from posttrain.algorithm import Algorithm
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import PosttrainError
from posttrain.models._published import PUBLISHED
from posttrain.parallel.shares import Shares
from posttrain.planning import remedies
from posttrain.planning.cache_size import cache_bytes, encoding_bytes
from posttrain.planning.counts import Counts
from posttrain.planning.data import known
from posttrain.planning.gpus import custom, gpu
from posttrain.planning.memory import Phase, memory
from posttrain.planning.needs import evaluation_needs, stage_needs
from posttrain.planning.remedies import evaluation_remedies, stage_remedies
from posttrain.planning.sizes import Sizes, Transformer, disk_bytes, moment_bytes, stage_sizes
from posttrain.planning.tables import Budget, resources
from posttrain.policy.activations import Checkpointing
from posttrain.policy.tuning import Full
from posttrain.recipe.file import load_recipe, overridden, parse_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
COSTS = {
    "diffusion_nft": (9, 10 + 9 * (1 + 1 + 3)),  # ten rollout steps; old, reference and policy at nine points
    "flow_grpo": (9, 2 * 10 + 9 * 2 * (3 + 1)),  # the same under guidance, with a reference at each step
    "sft": (1, 3),
    "soar": (7, 2 + 7 * 3),  # one guided rollout step, and a forward-backward at each of seven points
}
"""Algorithm -> items, and forward-equivalents, of one sample by the published defaults."""
PROMPTS = "{prompts: {type: shapes, count: 24}, resolution: 64}"
CASES = {
    "sft": ("{type: sft}", "{type: shapes, images: 100}", ""),
    "soar": ("{type: soar}", "{type: shapes, images: 100}", ""),
    "flow_grpo": ("{type: flow_grpo, group_size: 4, num_steps: 3}", PROMPTS, "rewards: jpeg_compressibility"),
    "diffusion_nft": (
        "{type: diffusion_nft, group_size: 4, num_steps: 3}",
        PROMPTS,
        "rewards: jpeg_compressibility",
    ),
}


# in one worker, which counts each model once
pytestmark = pytest.mark.xdist_group("tests/test_plan.py")

COUNTED = {}


def counts_of(model, *, cuda):
    """The counts of a model, one for all tests: they remember what they counted."""
    return COUNTED.setdefault((model.model_dump_json(), cuda), Counts(model, cuda=cuda))


@pytest.fixture(scope="module")
def sd35m():
    """The counts of SD3.5 Medium at the 77 tokens of the published figures."""
    return counts_of(
        load_recipe("sd35m-soar", ["model.max_sequence_length=77"], checks=False).model, cuda=True
    )


def test_the_published_shape_has_the_published_number_of_weights(sd35m):
    outline = sd35m.outline()
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(outline.transformer) == 2_243_171_520
    assert count(outline.vae) == 83_819_683
    encoders = [count(e) for e in outline.text_encoders()]
    assert encoders == [123_650_304, 694_659_840, 4_762_310_656]
    assert set(PUBLISHED["stabilityai/stable-diffusion-3.5-medium"]) >= {"transformer", "vae", "scheduler"}


def test_a_forward_of_sd35m_at_512_px_is_about_2_1_tflop(sd35m):
    assert sd35m.flops("forward", (512, 512)) == pytest.approx(2.1e12, rel=0.03)


def test_a_soar_step_of_sd35m_with_6_points_is_about_48_tflop_a_sample(sd35m):
    calls = rehearse(Algorithm.variants["soar"](trajectory_length=6))
    assert calls.forward_equivalents * sd35m.flops("forward", (512, 512)) == pytest.approx(48e12, rel=0.03)


def test_1000_steps_of_flow_grpo_on_ocr_are_63_gpu_hours_without_the_references_forwards(sd35m):
    stage = load_recipe("sd35m-grpo-ocr", checks=False).stages[0]
    samples = 1000 * stage.train.batch_size / stage.train.steps_per_batch
    hours = {
        beta: rehearse(stage.algorithm.model_copy(update={"beta": beta})).forward_equivalents
        * samples * sd35m.flops("forward", (512, 512)) / 400e12 / 3600
        for beta in (0.0, stage.algorithm.beta)
    }  # fmt: skip
    assert hours[0.0] == pytest.approx(63, rel=0.02)
    assert hours[stage.algorithm.beta] == pytest.approx(79, rel=0.02)


@pytest.mark.parametrize("name", COSTS)
def test_an_algorithm_costs_what_it_says(name):
    calls = rehearse(Algorithm.variants[name]())
    assert (calls.items, calls.forward_equivalents) == COSTS[name]


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


def need(recipe, *, cuda=False, devices=1, limit=math.inf, counts=None):
    counts = counts or counts_of(recipe.model, cuda=cuda)
    return stage_needs(recipe, recipe.stages[0], counts, devices, limit)


OFTEN = [("sft", "{type: full}"), ("sft", "{type: lora, rank: 8}"), ("flow_grpo", "{type: full}")]
MEASURED = [
    *(
        pytest.param(name, tune, "", marks=[] if (name, tune) in OFTEN else pytest.mark.matrix)
        for name in CASES
        for tune in ("{type: full}", "{type: lora, rank: 8}")
    ),
    ("sft", "{type: full}", "gradient_checkpointing: selective"),
    ("sft", "{type: full}", "gradient_checkpointing: full"),
    ("sft", "{type: full}", "optimizer: adamw8bit"),
]


@pytest.fixture(scope="module")
def measuring():
    """The running program of measured_memory.py."""
    malloc = {"MMAP_THRESHOLD_": "65536", "TRIM_THRESHOLD_": "0", "ARENA_MAX": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{f"MALLOC_{n}": v for n, v in malloc.items()}}
    command = [sys.executable, str(Path(__file__).parent / "measured_memory.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as program:
        yield program
        program.stdin.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident peak is reset by Linux only")
@pytest.mark.parametrize(("name", "tune", "train"), MEASURED)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(tmp_path, measuring, name, tune, train):
    from posttrain.recipe.file import dump_recipe

    recipe = planned(name, tune, f"micro_batch: 32, {train}")
    estimate = need(recipe).memory.total
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    measuring.stdin.write(f"{tmp_path / 'r.yaml'}\n")
    measuring.stdin.flush()
    measured = float(measuring.stdout.readline())
    figures = f"{estimate / 1e6:.0f} | {measured / 1e6:.0f} | {estimate / measured:.2f}"
    print(f"\n| {name} | {tune} {train} | {figures} |")
    assert estimate == pytest.approx(measured, rel=0.15)


def test_checkpointing_and_a_smaller_micro_batch_need_less():
    def total(train):
        needs = need(planned("sft", train=train))
        return needs.memory.total, needs.training.full

    whole, less = total("micro_batch: 32"), total("micro_batch: 8")
    selective = total("micro_batch: 32, gradient_checkpointing: selective")
    again = total("micro_batch: 32, gradient_checkpointing: full")
    assert less[0] < whole[0] / 2
    assert again[0] < whole[0] / 2
    assert again[0] < selective[0] < whole[0] * 0.7
    assert selective[1] == whole[1]
    assert again[1] == pytest.approx(whole[1] * 4 / 3)


SIZES = Sizes(
    trained=100, frozen=80, moments=800, roles=400, rewards=3, encoders={"prompts": 5, "images": 2},
    gathered=30, gathered_gradients=20,
)  # fmt: skip
IDLE = frozenset({"prompts", "images"})
PHASES = {"training": Phase(50.0, 5.0, gradients=True, encoders=IDLE, forward=True, backward=True)}


def shared(block, devices=4):
    spread = load_recipe("sd35m-soar", [f"parallel={block}"], checks=False).parallel
    found = memory(SIZES, PHASES, replace(spread.shares(devices), buffer=0))
    return found.parts, found.host


def test_a_strategy_divides_what_it_says():
    whole = {
        "weights": 490, "gradients": 400, "optimizer": 800, "roles": 400, "activations": 50, "caches": 5,
    }  # fmt: skip
    assert shared("{strategy: single}", 1) == shared("{strategy: ddp}") == (whole, 0)
    zero = [shared(f"{{strategy: deepspeed, zero_stage: {stage}}}")[0] for stage in (1, 2, 3)]
    assert [m["optimizer"] for m in zero] == [200, 200, 200]
    assert [m["gradients"] for m in zero] == [400, 100, 100]
    assert [m["roles"] for m in zero] == [400, 400, 100]
    assert [m["weights"] for m in zero] == [590, 590, 230]
    fsdp, host = shared("{strategy: fsdp2}")
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer"], fsdp["caches"]) == (130, 100, 200, 55)
    assert host == 0


def test_offloading_moves_to_the_host_what_it_says():
    fsdp, host = shared("{strategy: fsdp2, offload: true}")
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer"], fsdp["roles"]) == (10, 0, 0, 0)
    assert host == 120 + 100 + 200 + 100
    zero, host = shared("{strategy: deepspeed, zero_stage: 2, offload: true}")
    assert (zero["weights"], zero["gradients"], zero["optimizer"], zero["roles"]) == (490, 0, 0, 400)
    assert host == 3 * 100 + 100 + 200
    zero, host = shared("{strategy: deepspeed, zero_stage: 3, offload: true}")
    assert (zero["weights"], zero["gradients"], zero["optimizer"], zero["roles"]) == (10, 0, 0, 0)
    assert host == 120 + 2 * 100 + 100 + 200 + 100
    # a device without memory of its own has it all
    spread = load_recipe("sd35m-soar", ["parallel={strategy: fsdp2, offload: true}"], checks=False).parallel
    alone = memory(SIZES, PHASES, spread.shares(4), separate=False)
    assert (alone.optimizer, alone.host) == (200, 0)


def test_a_deepspeed_file_says_what_is_spread_and_offloaded(tmp_path):
    file = tmp_path / "zero.json"
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000}
    file.write_text(json.dumps({"zero_optimization": zero}))
    block = f"parallel={{strategy: deepspeed, config: {file}}}"
    spread = load_recipe("sd35m-soar", [block], checks=False).parallel
    shares = spread.shares(2)
    assert shares.buffer == 4000
    assert (shares.weights.fraction, shares.gradients.fraction, shares.moments.fraction) == (1, 1, 0.5)
    assert shares.moments.on_host
    assert spread.described(2) == "DeepSpeed ZeRO-1, offloaded"


@pytest.mark.matrix
@pytest.mark.parametrize(
    "block",
    [
        "{strategy: ddp}",
        "{strategy: fsdp2}",
        *(f"{{strategy: deepspeed, zero_stage: {stage}}}" for stage in (1, 2, 3)),
        *(f"{{strategy: deepspeed, zero_stage: {stage}, offload: true}}" for stage in (2, 3)),
    ],
)
def test_two_processes_hold_what_their_shares_say(block):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*run, str(Path(__file__).parent / "held_memory.py"), block],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("held")), None)
    assert line is not None, done.stderr
    held, planned = map(float, line.split()[1:])
    assert planned == pytest.approx(held, rel=0.03)


def test_ddp_keeps_the_room_of_gradients_between_steps():
    phases = {"text": Phase(500.0)}
    spread = {n: load_recipe("sd35m-soar", checks=False).parallel.shares(n) for n in (1, 2)}
    assert [memory(SIZES, phases, spread[n]).gradients for n in (1, 2)] == [0, 400]


def test_the_phase_that_needs_most_counts():
    first = {"training": Phase(500.0), "optimizer": Phase(0.0, gradients=True)}
    assert memory(SIZES, first, Shares()).phase == "training"
    assert memory(SIZES, first, Shares()).gradients == 0
    assert memory(SIZES, {**first, "training": Phase(300.0)}, Shares()).phase == "optimizer"


def test_moments_in_8_bits_take_a_quarter_but_for_small_tensors():
    small, large = 4095, 4096
    assert moment_bytes("adamw", [small, large]) == 8 * 8191
    assert moment_bytes("adamw8bit", [small]) == 8 * 4095
    assert moment_bytes("adamw8bit", [large]) == 2 * 4096 + 8 * 16


def test_micro_batch_auto_is_the_largest_power_of_two_that_fits():
    recipe = planned("sft", train="micro_batch: auto")
    counts = counts_of(recipe.model, cuda=False)
    assert need(recipe, counts=counts).auto_micro_batch == 32
    assert need(recipe, counts=counts, devices=3).auto_micro_batch == 8  # 11 items on the first of 3
    chosen = need(recipe, counts=counts, limit=105e6)
    assert chosen.auto_micro_batch == 8
    assert chosen.memory == need(planned("sft", train="micro_batch: 8"), counts=counts).memory
    assert need(recipe, counts=counts, limit=1).auto_micro_batch == 1
    assert need(planned("sft")).auto_micro_batch is None


def test_encoders_at_rest_are_on_the_device_only_while_they_work(sd35m_soar):
    def peak(*settings, devices=1):
        recipe = load_recipe("sd35m-soar", [*SOAR, *settings], checks=False)
        return need(recipe, counts=sd35m_soar(recipe), devices=devices)

    everything = peak()
    assert everything.memory.phase == "training"
    assert everything.memory.host == 0
    offloaded = peak("model.offload=true")
    encoders = 2 * (123_650_304 + 694_659_840 + 4_762_310_656)
    assert offloaded.memory.host == encoders + 4 * 83_819_683
    assert offloaded.memory.total == everything.memory.total - offloaded.memory.host
    cached = peak("cache.prompts=true")
    assert cached.memory.host == encoders
    assert cached.memory.total == everything.memory.total - encoders
    # where training needs little, the encoders' work needs most
    spread = "parallel={strategy: fsdp2}"
    assert peak("model.offload=true", spread, devices=8).memory.phase == "text"
    assert peak("cache.prompts=true", spread, devices=8).memory.phase == "fill prompts"


SOAR = ["stages.soar.train.sample_every=null"]


@pytest.fixture(scope="module")
def sd35m_soar():
    """Counts of the recipe's model, one for all its settings, which change none."""
    made = []

    def counts(recipe):
        made.append(made[0] if made else counts_of(recipe.model, cuda=True))
        return made[0]

    return counts


def test_the_modes_of_checkpointing_take_4_5_1_35_and_0_15_gb_a_row(sd35m_soar):
    counts = sd35m_soar(load_recipe("sd35m-soar", checks=False))
    modes: list[Checkpointing] = ["off", "selective", "full"]
    rows = [counts.memory("training", (512, 512), Full(), torch.bfloat16, mode).each / 1e9 for mode in modes]
    assert rows == pytest.approx([4.5, 1.35, 0.15], rel=0.05)


def test_what_is_cached_is_encoded_once():
    def rollout(name, *settings):
        return need(overridden(planned(name), settings)).rollout

    counts = counts_of(planned("sft").model, cuda=False)
    text, encode = (counts.flops(work, (64, 64)) for work in ("text", "encode"))
    often = "stages.only.train.steps=20"  # of 32 samples of 100 images
    plain = rollout("sft", often)
    assert rollout("sft", often, "cache.prompts=true").low == pytest.approx(plain.low - text * 540)
    assert rollout("sft", often, "cache.latents=sampled").full == pytest.approx(plain.full - encode * 540)
    grpo = rollout("flow_grpo", often)  # 8 prompts a batch, 24 in all, of which 2 are equal
    assert rollout("flow_grpo", often, "cache.prompts=true").low == pytest.approx(
        grpo.low - text * (160 - 23)
    )


def test_the_caches_size_is_told_where_it_is_known(tmp_path):
    recipe = overridden(planned("sft"), ["cache={prompts: true, latents: mean_logvar, dtype: bf16}"])
    counts = counts_of(recipe.model, cuda=False)
    prompt, image = (encoding_bytes(counts.outline(), encoder, 64) for encoder in ("prompts", "images"))
    assert prompt == 4 * ((16 + 16) * 96 + 96)  # CLIP's and T5's tokens, and the pooled embeddings
    assert image == 2 * 4 * 8 * 8 * 8  # mean and log-variance of 8 channels
    assert cache_bytes(recipe, counts) == 100 * prompt / 2 + 100 * image / 2
    unknown = load_recipe("sd35m-soar", ["cache.prompts=true"], checks=False)
    assert cache_bytes(unknown, counts_of(unknown.model, cuda=True)) is None


def test_images_of_many_sizes_are_planned_for_the_largest(tmp_path, monkeypatch):
    recipe = load_recipe("sd35m-sft", ["stages.0.data.resolution=null"], checks=False)
    counts = counts_of(recipe.model, cuda=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PosttrainError, match=r"data\.resolution: without it.*cannot be read here"):
        known(recipe.stages[0].data, counts, "sft")
    data = Path(recipe.stages[0].data.images)
    (data.parent / "images").mkdir(parents=True)
    rows = [("a", 512, 512, "one"), ("b", 768, 384, "one"), ("c", 640, 512, "two")]
    for name, *_ in rows:
        (data.parent / "images" / f"{name}.jpg").write_bytes(b"x")
    data.write_text(
        "".join(json.dumps({"md5": n, "bw": w, "bh": h, "caption_en": c}) + "\n" for n, w, h, c in rows)
    )
    found = known(recipe.stages[0].data, counts_of(recipe.model, cuda=True), "sft")
    assert (found.size, found.prompts, found.images) == ((512, 640), 2, 3)


def test_remedies_make_it_fit_and_the_cheapest_comes_first():
    recipe = planned("sft")
    counts = counts_of(recipe.model, cuda=False)
    found = stage_remedies(recipe, "only", counts, 1, 105e6)
    assert found[0].settings == ("stages.only.train.micro_batch=8",)
    assert found[0].price == "changes no result, a little slower"
    assert all(remedy.needs.memory.total <= 105e6 for remedy in found)
    (least,) = stage_remedies(recipe, "only", counts, 1, 1e6)
    assert least.needs.memory.total > 1e6


def test_a_micro_batch_that_the_plan_chooses_is_not_lowered():
    recipe = planned("sft", train="micro_batch: auto")
    for remedy in stage_remedies(recipe, "only", counts_of(recipe.model, cuda=False), 1, 55e6):
        assert not any("micro_batch" in setting for setting in remedy.settings)


CHECKPOINTING = "stages.soar.train.gradient_checkpointing"


@pytest.mark.parametrize(
    ("devices", "gigabytes", "settings", "price"),
    [
        (1, 50, ("cache.prompts=true",), "2.73 MB of disk for each prompt"),
        (1, 50, ("model.offload=true",), "text encoders and VAE travel for each batch"),
        (1, 43, ("cache.prompts=true", f"{CHECKPOINTING}=selective"), "a little more time for training"),
        (1, 43, ("cache.prompts=true", f"{CHECKPOINTING}=full"), "a third more time for training"),
        (1, 36, ("cache.prompts=true", "stages.soar.train.optimizer=adamw8bit"), "moments rounded to 8 bits"),
        (8, 24, ("cache.prompts=true", "parallel={strategy: fsdp2}"), "weights travel between devices"),
        (
            1,
            36,
            ("parallel={strategy: deepspeed, zero_stage: 2, offload: true}",),
            "the CPU takes the optimizer's steps",
        ),
        (1, 36, ("parallel={strategy: fsdp2, offload: true}",), "weights come from its memory"),
        (1, 26, ("stages.soar.tune.type=lora",), "another training: an adapter"),
    ],
)
def test_each_remedy_is_found_where_it_is_the_cheapest_of_its_price(
    sd35m_soar, devices, gigabytes, settings, price
):
    plain = [*SOAR, "stages.soar.train.micro_batch=1", "stages.soar.train.gradient_checkpointing=off"]
    recipe = load_recipe("sd35m-soar", plain, checks=False)
    found = stage_remedies(recipe, "soar", sd35m_soar(recipe), devices, gigabytes * 1e9)
    (remedy,) = [remedy for remedy in found if remedy.settings == settings]
    assert remedy.needs.memory.total <= gigabytes * 1e9
    assert price in remedy.price


def test_what_is_proposed_needs_less_by_itself():
    train = ["stages.only.train.sample_every=1", "stages.only.train.micro_batch=8"]
    recipe = overridden(planned("sft"), train)
    counts = counts_of(recipe.model, cuda=True)
    whole = need(recipe, counts=counts, devices=4).memory.total
    changes = list(remedies._changes(recipe, recipe.stages[0], counts, 4))
    assert len(changes) == 11
    for change in changes:
        less = need(overridden(recipe, [change.setting]), counts=counts, devices=4).memory
        # DeepSpeed's bucket alone is larger than this model, and grids are not what needs most
        total = less.total - 2e9 if "deepspeed" in change.setting else less.total
        assert total <= whole if "sample_every" in change.setting else total < whole, change
        moved = change.field in ("cache.prompts", "model.offload") or "offload" in change.setting
        assert (less.host > 0) == moved


def test_what_the_schema_refuses_is_no_remedy(sd35m_soar):
    recipe = load_recipe("sd35m-soar", [*SOAR, "parallel={strategy: fsdp2}"], checks=False)
    for gigabytes in (10, 20, 30):
        for remedy in stage_remedies(recipe, "soar", sd35m_soar(recipe), 2, gigabytes * 1e9):
            assert not any("adamw8bit" in setting for setting in remedy.settings)


def test_the_evaluation_has_remedies_too():
    recipe = load_recipe("sd35m-grpo-ocr", checks=False)
    counts = counts_of(recipe.model, cuda=True)
    whole = evaluation_needs(recipe, recipe.evaluation, counts).memory.total
    first, *_ = evaluation_remedies(recipe, counts, whole - 1e9)
    assert first.settings[0].startswith("evaluation.batch_size=")
    assert first.needs.memory.total <= whole - 1e9
    (other,) = evaluation_remedies(recipe, counts, 1e9)
    assert "model.offload=true" in other.settings


def test_gpus_are_known_by_the_names_people_write():
    assert gpu("NVIDIA H100 80GB HBM3").flops == 989e12
    assert gpu("rtx 4090").memory_bytes == 24e9
    with pytest.raises(PosttrainError, match="one of 'A100 80GB', 'A100 40GB'"):
        gpu("a100")
    with pytest.raises(PosttrainError, match=r"did you mean 'H200 141GB'.*--memory 48GB --tflops 362"):
        gpu("H200 14GB")
    assert [custom(text, 1).memory_bytes for text in ("60MB", "48", "44.5 GiB")] == [60e6, 48e9, 44.5 * 2**30]
    with pytest.raises(PosttrainError, match="no size"):
        custom("lots", 100)


def test_time_is_work_over_what_the_devices_sustain():
    from posttrain.planning.work import Work

    budget = Budget(gpu("h100"), 8, 0.5, "given", tf32=True)
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
    plan = resources(recipe, Budget(custom("60MB", 1), 8, 0.4, "assumed", tf32=True), cuda=True)
    for width in (80, 120):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        with console.capture() as shown:
            console.print(plan)
        text = shown.get()
        for words in (
            "micro_batch auto is planned as",
            "cache: its size is at most",
            "It would with",
            "host",
        ):
            assert words in text
        assert "…" not in text
        assert all(len(line) <= width for line in text.splitlines())


def test_every_shipped_recipe_has_a_size_and_a_shape():
    for name in shipped_recipes():
        recipe = load_recipe(name, checks=False)
        counts = counts_of(recipe.model, cuda=True)
        assert counts.outline().transformer is not None
        assert all(known(stage.data, counts, stage.name).size[0] >= 64 for stage in recipe.stages)


@pytest.mark.parametrize("tune", ["full", "lora"])
@pytest.mark.parametrize("settings", [(), ("model.path=stabilityai/stable-diffusion-3.5-medium",)])
def test_the_check_counts_what_the_plan_counts(tune, settings):
    optimizer = "stages.only.train.optimizer=adamw8bit"
    recipe = overridden(planned("flow_grpo", f"{{type: {tune}}}"), [*settings, optimizer])
    (stage,), shapes = recipe.stages, recipe.model.transformer_shapes()
    outline = Counts(recipe.model, cuda=True).outline(stage.tune)
    by_shape = stage_sizes(recipe, stage, Transformer.from_shapes(recipe, stage, shapes))
    assert by_shape == stage_sizes(recipe, stage, Transformer.from_module(outline.transformer))


def test_a_checkpoint_has_weights_moments_ema_and_the_roles_that_move():
    moving, reference = (
        load_recipe(name, checks=False).stages[0] for name in ("sd35m-nft-ocr", "sd35m-grpo-ocr")
    )
    for stage, copies in ((moving, 2), (reference, 1)):  # NFT: EMA and old policy; GRPO: EMA
        sizes = Sizes(trained=10, frozen=0, moments=80, roles=0)
        assert disk_bytes(stage, sizes) == stage.train.keep_checkpoints * (40 * (1 + copies) + 80) + 40
