"""Every field of a recipe is known to change results or not, and a stage is compared by those that do."""

import json
import warnings
from pathlib import Path
from typing import Literal

import pytest
from pydantic import create_model
from runs import EVALUATION, HEAD, TRAIN, recipe, stage

from posttrain.algorithm import Algorithm
from posttrain.cache.settings import Cache
from posttrain.data.family import Data
from posttrain.data.settings import PromptFile, ShapesPrompts
from posttrain.engine.monitor import Monitor
from posttrain.model import Model
from posttrain.optim.settings import Train
from posttrain.policy.tuning import Tune
from posttrain.recipe.deciding import DEFAULTS, ancestors, deciding, fingerprint, former_fingerprint
from posttrain.recipe.file import overridden
from posttrain.recipe.schema import Evaluation, Recipe, Stage
from posttrain.registry import FREE, LATE, mark_of
from posttrain.reward import Reward
from posttrain.support.differences import differences

MARKED = {
    Recipe: "name device parallel tracker evaluation",
    Train: "micro_batch gradient_checkpointing compile log_every checkpoint_every checkpoint_minutes "
    "keep_checkpoints keep_every keep_best sample_every stop_after_refused steps",
    Stage: "export_dtype",
    Evaluation: "batch_size grid keep",
    Cache: "path max_size",
    "images": "tolerance workers",
    "shapes data": "workers",
    "pairs": "tolerance workers",
    "shapes_pairs": "workers",
    "sana": "offload",
    "sd3": "offload",
    "qwen_image": "offload",
    "qwen_image_21": "offload",
    "flux": "offload",
    "flux2_klein": "offload",
    "z_image": "offload",
    "diffusers": "offload",
    "remote": "batch_size",
    "unifiedreward": "concurrency",
}
"""Block -> its fields that change no result, or none but when and how the trained weights are written."""
DECIDING = {
    Recipe: "seed tf32 model cache stages",
    Train: "batch_size steps_per_batch optimizer learning_rate schedule warmup_steps weight_decay betas eps "
    "max_grad_norm ema precision",
    Stage: "name start_from algorithm data rewards reference monitor tune train",
    Evaluation: "resolution steps guidance solver precision seed prompts rewards images_per_prompt",
    Cache: "prompts latents dtype",
    Monitor: "every prompts window reward_hacking spread_collapse spread_fraction",
    PromptFile: "path",
    ShapesPrompts: "count seed tasks",
    "images": "images image_dir image_column caption_column split subset resolution crop flip max_pixels",
    "shapes data": "images seed style",
    "pairs": "pairs image_dir resolution crop flip max_pixels",
    "shapes_pairs": "pairs seed",
    "prompts": "prompts resolution",
    "full": "",
    "lora": "rank alpha init targets before base",
    "sana": "path revision dtype max_sequence_length complex_human_instruction",
    "sd3": "path revision dtype max_sequence_length text_encoder_3",
    "qwen_image": "path revision dtype max_sequence_length",
    "qwen_image_21": "path revision dtype max_sequence_length",
    "flux": "path revision dtype max_sequence_length train_guidance",
    "flux2_klein": "path revision dtype max_sequence_length grid_steps",
    "diffusers": "path revision dtype pipeline mapping max_sequence_length",
    "z_image": "path revision dtype max_sequence_length cfg_normalization",
    "tiny_sd3": "seed layers heads head_dim autoencoder_steps autoencoder_images shift",
    "sft": "weighting_scheme logit_mean logit_std mode_scale cond_dropout",
    "soar": "weighting_scheme logit_mean logit_std mode_scale cond_dropout lambda_aux num_rollout_paths "
    "trajectory_length sde_rollout_type sde_noise_scale cfg_scale_sampling num_sampling_steps sigma_floor",
    "reflexflow": "weighting_scheme logit_mean logit_std mode_scale cond_dropout adr_weight fc_weight fc_alpha step_range",
    "flow_grpo": "group_size num_steps timestep_fraction global_std adv_clip_max reward_mixing sde_type noise_level "
    "guidance_scale sde_window_size sde_window_range init_same_noise clip_range beta kl_type grpo_guard "
    "drop_zero_advantage",
    "diffusion_nft": "group_size num_steps timestep_fraction global_std adv_clip_max reward_mixing solver "
    "guidance_scale beta kl_weight adv_mode decay_type",
    "awm": "group_size num_steps timestep_fraction global_std adv_clip_max reward_mixing solver guidance_scale "
    "off_policy train_timesteps time_type weighting ghuber_power advantage_max clip_range beta ema_beta kl_weighting "
    "kl_ema_decay kl_ema_decay_type",
    "dpo": "weighting_scheme logit_mean logit_std mode_scale cond_dropout beta",
    "dpo_online": "weighting_scheme logit_mean logit_std mode_scale cond_dropout group_size num_steps solver guidance_scale "
    "points_per_pair beta",
    "shapes reward": "score",
    "geneval": "score detector clip threshold counting_threshold max_objects shorter_side longer_side",
    "pickscore": "path processor",
    "hpsv2": "path tokenizer",
    "imagereward": "path tokenizer",
    "clipscore": "path",
    "aesthetic": "path head",
    "jpeg_compressibility": "",
    "jpeg_incompressibility": "",
    "callable": "function",
    "ocr": "",
    "remote": "name better lowest highest",
    "unifiedreward": "model question",
}
"""Block -> its other fields. A new field belongs into one of the two tables."""
NEURAL, HTTP = "batch_size offload", "url token_env timeout_seconds retries backoff_seconds"


def blocks():
    """Every block of a recipe that trains, with the name that the tables give it."""
    named = {"shapes": {Data: "shapes data", Reward: "shapes reward"}}
    for family in (Data, Model, Tune, Algorithm, Reward):
        for name, spec in family.variants.items():
            if spec.__module__.startswith("posttrain.") and getattr(spec, "trainable", True):
                yield named.get(name, {}).get(family, name), spec
    yield from ((spec, spec) for spec in MARKED.keys() | DECIDING.keys() if not isinstance(spec, str))


def marked(key, spec):
    """The names in MARKED, with those that a reward inherits."""
    bases = {base.__name__ for base in spec.__mro__}
    inherited = NEURAL if "Neural" in bases else HTTP if "OverHttp" in bases else ""
    inherited += " limit_minutes" if "Reward" in bases else ""
    return {*MARKED.get(key, "").split(), *inherited.split()}


BLOCKS = sorted(blocks(), key=str)


@pytest.mark.parametrize(("key", "spec"), BLOCKS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_field_is_known_to_change_results_or_not(key, spec):
    own = {name: field for name, field in spec.model_fields.items() if name not in ("type", "weight")}
    assert {name for name, field in own.items() if mark_of(field)} == marked(key, spec)
    assert {name for name, field in own.items() if mark_of(field) is None} == set(DECIDING[key].split())


@pytest.mark.parametrize(("key", "spec"), BLOCKS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_block_is_compared_by_its_unmarked_fields_and_by_late_ones_if_asked(key, spec):
    if spec in (Monitor, Cache):
        return  # below
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the values are not of the fields' types
        values = {name: f"{name} one" for name in spec.model_fields}
        before = spec.model_construct(**values)
        for name, field in spec.model_fields.items():
            now = spec.model_construct(**{**values, name: "two"})
            for late in (True, False):
                same = before.deciding(late=late) == now.deciding(late=late)
                assert same == (mark_of(field) is FREE or (mark_of(field) is LATE and not late)), name


BOTH = recipe(
    stage("sft", train=TRAIN.replace("}", ", schedule: cosine}")),
    stage("soar", "{type: soar, trajectory_length: 2}"),
    stage("side", start_from="base"),
    evaluation=EVALUATION,
)
S = "stages.soar"
CHANGES = [
    # what is set in the recipe, and the fields in which soar differs then
    ("seed=1", ["seed (was 0, now 1)"]),
    ("tf32=false", ["tf32 (was True, now False)"]),
    *((f"{free}", []) for free in ("name=b", "device=auto", "tracker=tensorboard", "model.offload=true")),
    *((f"parallel={{strategy: {name}}}", []) for name in ("single", "ddp", "fsdp2")),
    ("model.dtype=bf16", ["model.dtype (was 'fp32', now 'bf16')"]),
    ("model.path=elsewhere", "model.path (was "),
    *((f"{S}.train.{free}", []) for free in (
        "micro_batch=2", "micro_batch=auto", "gradient_checkpointing=full", "compile=true", "compile=auto", "log_every=3",
        "checkpoint_every=5", "keep_checkpoints=1", "sample_every=3", "steps=9", "steps=2",
    )),  # its own steps are compared with what is done
    *((f"{S}.train.{field}={now}", [f"{S}.train.{field} (was {was}, now {now})"]) for field, was, now in (
        ("learning_rate", 0.001, 0.5), ("batch_size", 4, 8), ("weight_decay", 0.01, 0.5), ("eps", 1e-8, 0.5),
        ("warmup_steps", 0, 1), ("max_grad_norm", 1.0, 2.0), ("ema", 0.9, 0.5),
    )),
    (f"{S}.train.betas=[0.9, 0.5]", [f"{S}.train.betas.1 (was 0.999, now 0.5)"]),
    (f"{S}.train.precision=bf16", [f"{S}.train.precision (was 'fp32', now 'bf16')"]),
    (f"{S}.train.schedule=linear", [f"{S}.train.schedule (was 'constant', now 'linear')"]),
    (f"{S}.export_dtype=bf16", []),
    (f"{S}.algorithm.trajectory_length=3", [f"{S}.algorithm.trajectory_length (was 2, now 3)"]),
    (f"{S}.algorithm={{type: sft}}", [f"{S}.algorithm.type (was 'soar', now 'sft')"]),
    (f"{S}.tune={{type: lora}}", [f"{S}.tune.type (was 'full', now 'lora')"]),
    (f"{S}.data.workers=3", []),
    (f"{S}.data.images=11", [f"{S}.data.images (was 10, now 11)"]),
    (f"{S}.data={{images: a.jsonl}}", [f"{S}.data.type (was 'shapes', now 'images')"]),
    (f"{S}.start_from=sft", []),  # that is the default
    (f"{S}.monitor={{every: 2}}", []),  # it warns only
    (f"{S}.monitor={{every: 2, reward_hacking: warn}}", []),
    ("stages.sft.train.learning_rate=0.5", ["stages.sft.train.learning_rate (was 0.001, now 0.5)"]),
    ("stages.sft.train.steps=8", ["stages.sft.train.steps (was 6, now 8)"]),
    ("stages.sft.export_dtype=bf16", []),  # soar starts from the exact weights
    ("stages.sft.train.log_every=3", []),
    ("stages.side.train.learning_rate=0.5", []),  # soar does not start from it
    ("evaluation=null", []),
    ("evaluation.prompts.count=3", []),
    ("evaluation.steps=3", []),
    ("cache={prompts: true, latents: off}", []),
    ("cache={prompts: true, path: /a, max_size: 2GB}", []),
    ("cache={prompts: true, dtype: bf16}", ["cache.dtype (was 'fp32', now 'bf16 for prompts')"]),
    ("cache={prompts: true, latents: mean_logvar, dtype: bf16}", ["cache.dtype (was 'fp32', now 'bf16 for prompts and latents')"]),
    ("cache={latents: mean_logvar}", []),
    ("cache={latents: sampled}", ["cache.latents (was 'not sampled', now 'sampled')"]),
]  # fmt: skip


@pytest.mark.parametrize(("override", "expected"), CHANGES, ids=[change for change, _ in CHANGES])
def test_which_changes_of_a_recipe_change_a_stage(override, expected):
    found = list(differences(deciding(BOTH, "soar"), deciding(overridden(BOTH, [override]), "soar")))
    if isinstance(expected, str):
        (found,) = found
        assert found.startswith(expected)
    else:
        assert found == expected


@pytest.mark.parametrize(("override", "expected"), CHANGES, ids=[change for change, _ in CHANGES])
def test_a_fingerprint_changes_with_what_changes_a_stage(override, expected):
    changed = overridden(BOTH, [override])
    assert (fingerprint(changed, "soar") == fingerprint(BOTH, "soar")) == (expected == [])
    assert (former_fingerprint(changed, "soar") == former_fingerprint(BOTH, "soar")) == (expected == [])


def test_a_new_field_with_a_default_leaves_fingerprints_as_they_are():
    def of(**fields):
        made = create_model(
            "Toy", __base__=Algorithm, type=(Literal["toy_of_fields"], "toy_of_fields"), **fields
        )
        made.needs, made.__abstractmethods__ = "images", frozenset()
        try:
            return overridden(BOTH, []).model_copy(
                update={"stages": [BOTH.stages[0].model_copy(update={"algorithm": made()})]}
            )
        finally:
            del Algorithm.variants["toy_of_fields"]

    old, new, other = of(a=(int, 1)), of(a=(int, 1), b=(float, 2.0)), of(a=(int, 1), b=(float, 3.0))
    assert fingerprint(old, "sft") == fingerprint(new, "sft")
    changed = new.stages[0].algorithm.model_copy(update={"b": 4.0})
    changed = new.model_copy(update={"stages": [new.stages[0].model_copy(update={"algorithm": changed})]})
    assert fingerprint(changed, "sft") != fingerprint(new, "sft")
    assert former_fingerprint(old, "sft") != former_fingerprint(new, "sft")
    assert fingerprint(other, "sft") == fingerprint(new, "sft"), "which is why DEFAULTS is raised"


def test_a_new_field_of_a_block_that_has_its_defaults_leaves_fingerprints_as_they_are():
    longer = create_model("Longer", __base__=Train, novel=(int, 3))
    made = recipe(stage("sft", train="{steps: 6}"))
    (old,) = made.stages
    fields = {name: getattr(old.train, name) for name in Train.model_fields}
    for novel, same in ((3, True), (4, False)):
        train = longer.model_construct(**fields, novel=novel)
        changed = made.model_copy(update={"stages": [old.model_copy(update={"train": train})]})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it is not of the field's type
            assert (fingerprint(changed, "sft") == fingerprint(made, "sft")) == same


def test_defaults_are_those_of_their_version(monkeypatch):
    """A fingerprint leaves defaults out: where one changes, DEFAULTS in posttrain/recipe/deciding.py is raised."""
    recorded = json.loads((Path(__file__).parent / "defaults.json").read_text("utf-8"))
    found = {}
    for key, spec in BLOCKS:
        name = key if isinstance(key, str) else spec.__name__
        for field, info in spec.model_fields.items():
            if not info.is_required() and mark_of(info) is not FREE and field != "type":
                found[f"{name}.{field}"] = str(info.get_default(call_default_factory=True))
    changed = {name for name in found.keys() & recorded["fields"] if found[name] != recorded["fields"][name]}
    assert not changed, "raise DEFAULTS, and record the version and the defaults in tests/defaults.json"
    new = {name: default for name, default in found.items() if name not in recorded["fields"]}
    assert not new, f"add the new fields to tests/defaults.json: {json.dumps(new)[1:-1]}"
    assert recorded["version"] == DEFAULTS
    before = fingerprint(BOTH, "soar")
    monkeypatch.setattr("posttrain.recipe.deciding.DEFAULTS", DEFAULTS + 1)
    assert fingerprint(BOTH, "soar") != before


def test_another_parent_is_told_and_what_only_one_of_the_two_has():
    found = list(
        differences(deciding(BOTH, "soar"), deciding(overridden(BOTH, [f"{S}.start_from=base"]), "soar"))
    )
    assert found[0].startswith("stages.sft (was {'name': 'sft', ")
    assert found[1:] == [f"{S}.start_from (was 'sft', now 'base')"]


def test_an_alarm_that_rolls_back_decides_and_so_do_the_scores_that_it_reads():
    def with_monitor(action, every=2, **evaluation):
        block = f"{{every: {every}, spread_collapse: {action}}}"
        online = "{type: diffusion_nft, group_size: 2, num_steps: 2}"
        text = stage("rl", online, monitor=block, rewards="[shapes]")
        text = text.replace(
            "{type: shapes, images: 10, seed: 1}", "{prompts: {type: shapes, count: 3}, resolution: 16}"
        )
        return recipe(
            stage("sft"),
            text,
            evaluation=EVALUATION.replace("steps: 2", f"steps: {evaluation.get('steps', 2)}"),
        )

    def found(before, now):
        return list(differences(deciding(before, "rl"), deciding(now, "rl")))

    for action in ("warn", "stop"):
        assert found(with_monitor("warn"), with_monitor(action, every=3, steps=5)) == []
    rolling = with_monitor("rollback")
    assert found(rolling, with_monitor("rollback", every=3)) == ["stages.rl.monitor.every (was 2, now 3)"]
    assert found(rolling, with_monitor("rollback", steps=5)) == ["evaluation.steps (was 2, now 5)"]
    assert "stages.rl.monitor (was None, now " in found(with_monitor("warn"), rolling)[0]
    assert "evaluation (was None, now " in found(with_monitor("warn"), rolling)[1]


def test_the_base_model_is_compared_by_the_model_alone():
    assert deciding(BOTH, "base") == deciding(overridden(BOTH, ["seed=4"]), "base")
    assert deciding(BOTH, "base") != deciding(overridden(BOTH, ["model.dtype=bf16"]), "base")


def test_the_stages_before_a_stage_are_those_whose_weights_it_loads():
    made = recipe(
        stage("a"), stage("b", start_from="base"), stage("c"), stage("d", start_from="a"), head=HEAD
    )
    assert [ancestors(made, name) for name in "abcd"] == [[], [], ["b"], ["a"]]
    nft = stage(
        "e", "{type: diffusion_nft, group_size: 2}", rewards="[shapes]", reference="c", start_from="d"
    )
    nft = nft.replace(
        "{type: shapes, images: 10, seed: 1}", "{prompts: {type: shapes, count: 3}, resolution: 16}"
    )
    made = recipe(stage("a"), stage("b", start_from="base"), stage("c"), stage("d", start_from="a"), nft)
    assert ancestors(made, "e") == ["a", "b", "c", "d"]
    assert deciding(made, "e")["stages"]["e"]["reference"] == "c"
    nft = nft.replace("start_from: d", "start_from: a")
    default = recipe(*(stage(n) for n in "abc"), nft.replace("reference: c", "reference: null"))
    named = recipe(*(stage(n) for n in "abc"), nft.replace("reference: c", "reference: a"))
    assert deciding(default, "e")["stages"]["e"]["reference"] == "a"  # it starts from there
    assert deciding(default, "e") == deciding(named, "e")
