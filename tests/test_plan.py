"""The plan knows what a recipe needs, and what to change where it does not fit."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plans import SOAR, counts_of, need, planned, soar_counts
from safetensors.torch import load_file

from posttrain.algorithm import Algorithm
from posttrain.engine.monitor import Monitor
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import PosttrainError
from posttrain.models._published import PUBLISHED
from posttrain.planning.cache_size import cache_bytes, encoding_bytes
from posttrain.planning.counts import Counts
from posttrain.planning.data import known
from posttrain.planning.sizes import Sizes, Transformer, disk_bytes, stage_sizes
from posttrain.policy.activations import Checkpointing
from posttrain.policy.tuning import Full, Lora
from posttrain.recipe.file import load_recipe, overridden, shipped_recipes
from posttrain.weights.pipeline_folder import local_folder

COSTS = {
    "awm": (
        6,
        14 + 6 * (1 + 1 + 1 + 3),
    ),  # at six noise levels the velocity before the batch, old and reference
    "diffusion_nft": (9, 10 + 9 * (1 + 1 + 3)),  # ten rollout steps; old, reference and policy at nine points
    "flow_grpo": (9, 2 * 10 + 9 * 2 * (3 + 1)),  # the same under guidance, with a reference at each step
    "reflexflow": (1, 3 + 2 * 3),  # a step, and the velocity at clean and biased latents; a pair is trained
    "sft": (1, 3),
    "soar": (7, 2 + 7 * 3),  # one guided rollout step, and a forward-backward at each of seven points
}
"""Algorithm -> items, and forward-equivalents, of one sample by the published defaults."""

# in one worker, which counts each model once
pytestmark = pytest.mark.xdist_group("plans")


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


def decided(micro_batch):
    return f"only: auto is planned as micro_batch {micro_batch}. A run takes what it finds fastest."


AUTO = "micro_batch: auto, compile: auto, gradient_checkpointing: auto"


@pytest.mark.parametrize(
    ("limit", "words"),
    [(math.inf, "off, micro_batch 32"), (57e6, "off, micro_batch 1"), (55e6, "0.5"), (51e6, "full")],
)
def test_what_is_auto_is_decided_for_the_device(limit, words):
    recipe = planned("sft", train=AUTO)
    on_cuda = need(recipe, counts=counts_of(recipe.model, cuda=True), limit=limit)
    assert f"compile true, gradient_checkpointing {words}" in on_cuda.decided
    assert on_cuda.mode["compile"] is True
    assert on_cuda.memory.total <= limit or words == "full"
    on_cpu = need(recipe, counts=counts_of(recipe.model, cuda=False), limit=limit)
    assert "compile false, gradient_checkpointing off, micro_batch" in on_cpu.decided
    assert on_cpu.mode["compile"] is False


def test_a_share_of_activations_lies_between_all_and_whole_blocks():
    def total(checkpointing):
        train = f"micro_batch: 32, compile: true, gradient_checkpointing: {checkpointing}"
        return need(planned("sft", train=train), cuda=True).memory.activations

    off, full = total("off"), total("full")
    assert total("selective") == pytest.approx((off + full) / 2)
    assert total("0.25") == pytest.approx(full + (off - full) / 4)


def test_bf16_weights_are_beside_float32_ones_unless_autocast_makes_them():
    def held(block):
        recipe = overridden(
            planned("sft", train="micro_batch: 1, precision: bf16"), [f"parallel={{strategy: {block}}}"]
        )
        return need(recipe, cuda=True, devices=2 if block != "single" else 1)

    trained = sum(counts_of(planned("sft").model, cuda=True).shape(Full()).transformer.trained)
    single, ddp, fsdp = (held(block).memory.weights for block in ("single", "ddp", "fsdp2"))
    assert single == ddp
    encoders = single - 6 * trained
    assert encoders > 0
    assert fsdp == pytest.approx(2 * trained + encoders)
    assert held("deepspeed").memory.weights == pytest.approx(
        4 * trained + 2 * trained + encoders
    )  # its flat copy of half of the weights


def test_micro_batch_auto_is_the_largest_power_of_two_that_fits():
    recipe = planned("sft", train="micro_batch: auto")
    counts = counts_of(recipe.model, cuda=False)
    assert need(recipe, counts=counts).decided == decided(32)
    assert need(recipe, counts=counts, devices=3).decided == decided(8)  # 11 items on the first of 3
    chosen = need(recipe, counts=counts, limit=105e6)
    assert chosen.decided == decided(8)
    assert chosen.memory == need(planned("sft", train="micro_batch: 8"), counts=counts).memory
    assert need(recipe, counts=counts, limit=1).decided == decided(1)
    assert need(planned("sft")).decided is None


def test_encoders_at_rest_are_on_the_device_only_while_they_work():
    def peak(*settings, devices=1):
        recipe = load_recipe("sd35m-soar", [*SOAR, *settings], checks=False)
        return need(recipe, counts=soar_counts(recipe), devices=devices)

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
    # where training needs little, the work of all encoders at once needs most, of a block at a time it does not
    spread = "parallel={strategy: fsdp2}"
    assert peak("cache.prompts=true", spread, devices=8).memory.phase == "fill prompts"
    assert peak("model.offload=true", spread, devices=8).memory.phase == "training"
    assert soar_counts(load_recipe("sd35m-soar", checks=False)).bytes_at_work("prompts") < 1.2e9


def test_the_rows_of_bf16_weights_take_3_5_1_4_and_0_19_gb():
    counts = soar_counts(load_recipe("sd35m-soar", checks=False))
    for tune, gigabytes in ((Full(), [3.49, 1.39, 0.187]), (Lora(), [2.22, 1.755, 0.195])):
        modes: list[Checkpointing] = ["off", "selective", "full"]
        held = [counts.memory("training", (512, 512), tune, None, mode, torch.bfloat16) for mode in modes]
        rows = [(one.peak(20) - one.peak(19)) / 1e9 for one in held]
        assert rows == pytest.approx(gigabytes, rel=0.02)


def test_the_modes_of_checkpointing_take_4_5_1_35_and_0_15_gb_a_row():
    counts = soar_counts(load_recipe("sd35m-soar", checks=False))
    modes: list[Checkpointing] = ["off", "selective", "full"]
    held = [counts.memory("training", (512, 512), Full(), torch.bfloat16, mode) for mode in modes]
    assert [(one.peak(2) - one.peak(1)) / 1e9 for one in held] == pytest.approx([4.5, 1.35, 0.15], rel=0.05)


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
    prompt, image = (encoding_bytes(counts, encoder, 64) for encoder in ("prompts", "images"))
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
        "".join(json.dumps({"md5": n, "bw": w, "bh": h, "caption_en": c}) + "\n" for n, w, h, c in rows),
        encoding="utf-8",
    )
    found = known(recipe.stages[0].data, counts_of(recipe.model, cuda=True), "sft")
    assert (found.size, found.prompts, found.images) == ((512, 640), 2, 3)


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
        one = 40 * (1 + copies) + 80
        assert disk_bytes(stage, sizes) == stage.train.keep_checkpoints * one + 40
        more = {"steps": 100, "checkpoint_every": 30, "keep_every": 30, "keep_best": "ocr"}
        kept = stage.model_copy(update={"train": stage.train.model_copy(update=more)})
        assert disk_bytes(kept, sizes) == (stage.train.keep_checkpoints + 3 + 1) * one + 40
        for action, good in (("warn", 0), ("rollback", 1)):  # and the one of the last good reading
            watched = stage.model_copy(update={"monitor": Monitor(reward_hacking=action)})
            assert disk_bytes(watched, sizes) == (stage.train.keep_checkpoints + good) * one + 40


def test_an_export_that_rounds_has_the_exact_weights_beside_it():
    stage, sizes = planned("sft").stages[0], Sizes(trained=10, frozen=0, moments=80, roles=0, exported=2)
    exact = disk_bytes(stage, replace(sizes, exported=4))
    assert disk_bytes(stage, sizes) == exact + 20


def test_a_full_export_has_its_own_copy_of_what_was_not_trained():
    full, lora = planned("sft"), planned("sft", "{type: lora}")
    folder = local_folder("posttrain/tiny-sd3")
    parts = (
        "vae",
        "scheduler",
        *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")),
    )
    files = [file for part in parts for file in (folder / part).iterdir()]
    half = [
        file for file in files if file.suffix == ".safetensors"
    ]  # and becomes float32, as the transformer
    numbers = sum(t.numel() for file in half for t in load_file(file).values() if t.is_floating_point())
    beside = sum(file.stat().st_size for file in files) + 2 * numbers
    for recipe, expected in ((full, beside), (lora, 0)):
        needs, (stage,) = need(recipe), recipe.stages
        sizes_of = counts_of(recipe.model, cuda=False).shape(stage.tune).transformer
        sizes = stage_sizes(recipe, stage, sizes_of)
        assert sizes.companions == beside
        assert needs.disk - disk_bytes(stage, replace(sizes, companions=0)) == expected
    elsewhere = overridden(full, ["model.path=stabilityai/stable-diffusion-3.5-medium"])
    assert stage_sizes(elsewhere, elsewhere.stages[0], sizes_of).companions is None
