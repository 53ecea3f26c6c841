"""A plan says which settings would be faster, by how much, and never one that does not fit."""

from dataclasses import replace

import pytest
from plans import SOAR, counts_of, planned, soar_counts

from posttrain.planning import speed
from posttrain.planning.budget import Budget
from posttrain.planning.gpus import gpu
from posttrain.planning.needs import stage_needs
from posttrain.planning.rates import Rates, shipped_rates
from posttrain.planning.speed import LEAST, speedups
from posttrain.recipe.file import load_recipe, overridden

# in one worker, which counts each model once
pytestmark = pytest.mark.xdist_group("plans")

TRAIN = "stages.soar.train"


def found(recipe, budget, limit=76e9, counts=None):
    return speedups(recipe, recipe.stages[0], counts or soar_counts(recipe), budget, limit)


def test_an_eager_recipe_is_told_to_compile_with_the_gain_that_the_plan_then_has():
    recipe, budget = load_recipe("sd35m-soar", SOAR, checks=False), Budget(gpu("h100"), 1)
    counts = soar_counts(recipe)
    *single, together = found(recipe, budget)
    assert single[0].settings[0] == f"{TRAIN}.compile=true"
    assert (f"{TRAIN}.compile=true",) in [faster.settings for faster in single]
    assert "compiling takes minutes" in single[0].price
    assert [f.factor for f in single] == sorted((f.factor for f in single), reverse=True)
    assert together.factor > single[0].factor
    before = budget.seconds(stage_needs(recipe, recipe.stages[0], counts))
    for faster in (*single, together):
        changed = overridden(recipe, faster.settings)
        after = stage_needs(changed, changed.stages[0], counts)
        assert after.memory.total <= 76e9
        assert faster.factor >= LEAST
        if not faster.at_most:
            assert faster.factor == pytest.approx(before / budget.seconds(after))


def test_sft_is_told_all_that_it_can_gain():
    recipe = load_recipe("sd35m-sft", [s.replace("soar", "sft") for s in SOAR], checks=False)
    *_, together = found(recipe, Budget(gpu("h100"), 1))
    assert together.factor > 3
    assert together.at_most  # the data are not here, so nobody knows how often an image comes
    assert {setting.partition("=")[0].rpartition(".")[2] for setting in together.settings} == {
        "compile",
        "micro_batch",
        "latents",
        "crop",
        "prompts",  # which alone would gain too little to be told
    }


def test_the_settings_of_measured_rows_are_tried_together():
    recipe = load_recipe("sd35m-soar", SOAR, checks=False)
    changes = speed._changes(recipe, recipe.stages[0], soar_counts(recipe), Budget(gpu("h100"), 1))
    best = [f"{TRAIN}.{s}" for s in ("compile=true", "gradient_checkpointing=off", "micro_batch=7")]
    assert tuple(best) in [change.settings for change in changes]
    # 20 GB more fit compiled blocks without checkpointing
    *_, together = found(recipe, Budget(gpu("h100"), 1), limit=96e9)
    assert set(best) <= set(together.settings)


def test_what_does_not_fit_is_not_proposed():
    recipe, budget = load_recipe("sd35m-soar", SOAR, checks=False), Budget(gpu("h100"), 1)
    least = stage_needs(recipe, recipe.stages[0], soar_counts(recipe)).memory.total
    for faster in found(recipe, budget, least + 1e9):
        assert not any("gradient_checkpointing=off" in s or "micro_batch=32" in s for s in faster.settings)
        assert faster.needs.memory.total <= least + 1e9


def test_what_is_set_already_and_what_the_schema_refuses_is_not_proposed():
    best = [f"{TRAIN}.{s}" for s in ("compile=true", "gradient_checkpointing=off", "micro_batch=7")]
    recipe = load_recipe("sd35m-soar", [*SOAR, *best], checks=False)
    for faster in found(recipe, Budget(gpu("h100"), 1)):
        assert not any("compile" in setting for setting in faster.settings)
    refused = load_recipe(
        "sd35m-soar", [*SOAR, "parallel={strategy: deepspeed, zero_stage: 3}"], checks=False
    )
    for faster in found(refused, Budget(gpu("h100"), 2)):
        assert not any("compile" in setting for setting in faster.settings)


def test_a_cache_gains_the_encodings_that_come_again():
    # 640 samples of 100 images: of the encodings, 540 go
    recipe = overridden(planned("sft"), ["stages.only.train.steps=20"])
    counts, budget = counts_of(recipe.model, cuda=False), Budget(gpu("h100"), 1, rates=Rates())
    (latents,) = (f for f in found(recipe, budget, counts=counts) if "latents" in f.settings[0])
    seconds = budget.seconds_by_kind(stage_needs(recipe, recipe.stages[0], counts))
    total = sum(seconds.values())
    assert latents.factor == pytest.approx(total / (total - seconds["encode"] * 540 / 640))
    assert not latents.at_most
    once = overridden(recipe, ["stages.only.train.steps=2"])
    assert found(once, budget, counts=counts) == []


def test_a_given_mfu_leaves_only_what_saves_work():
    recipe = load_recipe("sd35m-soar", SOAR, checks=False)
    settings = {s for f in found(recipe, replace(Budget(gpu("h100"), 1), mfu=0.4)) for s in f.settings}
    assert not any("compile" in s for s in settings)
    assert f"{TRAIN}.gradient_checkpointing=off" in settings


def test_an_automatic_micro_batch_stays_automatic():
    recipe = load_recipe("sd35m-soar", [*SOAR, f"{TRAIN}.micro_batch=auto"], checks=False)
    budget = Budget(gpu("h100"), 1, rates=shipped_rates())
    assert not any("micro_batch" in s for f in found(recipe, budget) for s in f.settings)
