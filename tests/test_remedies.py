"""A plan proposes settings that make a recipe fit, the cheapest first."""

import pytest
from plans import SOAR, counts_of, need, planned, soar_counts

from posttrain.planning import remedies
from posttrain.planning.needs import evaluation_needs
from posttrain.planning.phases import StagePlan
from posttrain.planning.remedies import evaluation_remedies, stage_remedies
from posttrain.recipe.file import load_recipe, overridden

# in one worker, which counts each model once
pytestmark = pytest.mark.xdist_group("plans")


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
        (1, 36, ("cache.prompts=true", "stages.soar.train.optimizer=adamw8bit"), "moments rounded to 8 bits"),
        (8, 22, ("cache.prompts=true", "parallel={strategy: fsdp2}"), "weights travel between devices"),
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
def test_each_remedy_is_found_where_it_is_the_cheapest_of_its_price(devices, gigabytes, settings, price):
    is_found([], devices, gigabytes, settings, price)


@pytest.mark.parametrize(
    ("gigabytes", "mode", "price"),
    [(18.5, "selective", "a little more time"), (17, "full", "a third more time for training")],
)
def test_a_lora_has_activations_to_compute_again(gigabytes, mode, price):
    # full tuning of one row holds the most at the end of the backward, when gradients are all there
    is_found(["stages.soar.tune.type=lora"], 1, gigabytes, (f"{CHECKPOINTING}={mode}",), price)


def is_found(changes, devices, gigabytes, settings, price):
    plain = [*SOAR, *changes, "stages.soar.train.micro_batch=1", f"{CHECKPOINTING}=off"]
    recipe = load_recipe("sd35m-soar", plain, checks=False)
    found = stage_remedies(recipe, "soar", soar_counts(recipe), devices, gigabytes * 1e9)
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


def test_what_the_schema_refuses_is_no_remedy():
    recipe = load_recipe("sd35m-soar", [*SOAR, "parallel={strategy: fsdp2}"], checks=False)
    for gigabytes in (10, 20, 30):
        for remedy in stage_remedies(recipe, "soar", soar_counts(recipe), 2, gigabytes * 1e9):
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


def test_a_lora_is_offered_packed_weights_last_and_they_need_less_once_they_are_loaded():
    recipe = overridden(planned("sft"), ["stages.only.tune.type=lora"])
    counts = counts_of(recipe.model, cuda=False)
    offered = [change.setting for change in remedies._changes(recipe, recipe.stages[0], counts, 1)]
    assert offered[-2:] == ["stages.only.tune.base=int8", "stages.only.tune.base=nf4"]
    frozen = []
    for setting in (None, *offered[-2:]):
        changed = recipe if setting is None else overridden(recipe, [setting])
        frozen.append(counts.shape(changed.stages[0].tune).transformer.frozen)
        phases = dict(StagePlan(changed, changed.stages[0], counts, 1, 8).phases())
        loading = phases["loading"].activations if setting else 0
        assert loading == frozen[0] - frozen[-1]
    assert frozen[0] > frozen[1] > frozen[2]
