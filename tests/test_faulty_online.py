"""Tests that faulty recipes with an online stage are refused with line, field and remedy."""

import pytest
from pipelines import pipeline_folder
from runs import EVALUATION, HEAD, stage

from posttrain.errors import RecipeError
from posttrain.recipe.file import dump_recipe, parse_recipe

GOOD = f"""\
name: rl
model: {{type: sd3, path: {pipeline_folder()}, max_sequence_length: 16}}
stages:
  - name: grpo
    algorithm:
      type: flow_grpo
      group_size: 4
      num_steps: 10
      sde_type: flow_sde
      kl_type: without_dt
      sde_window_size: 2
      sde_window_range: [0, 5]
    data: {{prompts: {{type: shapes, count: 12}}, resolution: 16}}
    rewards: {{shapes: 1.0, jpeg_compressibility: 0.5}}
    reference: base
    train: {{steps: 8, batch_size: 16, steps_per_batch: 2, checkpoint_every: 4, sample_every: null}}
    monitor: {{every: 4, reward_hacking: stop}}
  - name: nft
    algorithm: {{type: diffusion_nft, group_size: 4, adv_mode: all, solver: dpm2}}
    data: {{prompts: {{type: shapes, count: 12}}, resolution: 16}}
    rewards: shapes
    train: {{steps: 8, batch_size: 16, sample_every: null}}
evaluation:
  prompts: {{type: shapes, count: 6}}
  rewards: [shapes]
  resolution: 64
"""


def swap(old, new, count=1):
    assert GOOD.count(old) == count, old
    return GOOD.replace(old, new)


# (what is wrong, the text, line, words that the message must have)
FAULTS = [
    ("5 misspelt KL", swap("without_dt", "witout_dt"), 10, ["kl_type", "did you mean 'without_dt'", "velocity_mse"]),
    ("8 misspelt mixing", swap("kl_type: without_dt", "reward_mixing: advantage"), 10, ["reward_mixing", "'advantages'"]),
    ("9 wrong case", swap("sde_type: flow_sde", "sde_type: Flow_SDE"), 9, ["did you mean 'flow_sde'"]),
    ("10 an ODE rollout", swap("sde_type: flow_sde", "sde_type: ode"), 9, ["deterministic", "flow_sde", "diffusion_nft"]),
    ("10 no noise", swap("sde_type: flow_sde", "noise_level: 0"), 9, ["noise_level", "greater than 0"]),
    ("12 a group of one", swap("      group_size: 4", "      group_size: 1"), 7, ["group_size", "2"]),
    ("13 a negative group", swap("      group_size: 4", "      group_size: -4"), 7, ["group_size", "-4"]),
    ("14 a window beyond the steps", swap("[0, 5]", "[0, 12]"), 12, ["sde_window_range", "12", "10 steps"]),
    ("a fraction beside a range", swap("sde_window_range: [0, 5]", "sde_window_range: [0, 5]\n      timestep_fraction: 0.5"), 13, ["timestep_fraction", "no effect beside an sde_window_range"]),
    ("a KL of weight 0", swap("kl_type: without_dt", "kl_type: with_dt\n      beta: 0"), 10, ["kl_type", "no effect where beta"]),
    ("14 the last step trained", swap("sde_window_size: 2\n      sde_window_range: [0, 5]", "timestep_fraction: 1.0"), 11, ["timestep_fraction", "sigma = 0"]),
    ("15 more steps than the window has", swap("sde_window_size: 2", "sde_window_size: 6"), 11, ["sde_window_size", "does not fit", "[0, 5)"]),
    ("16 ends swapped", swap("[0, 5]", "[5, 0]"), 12, ["sde_window_range", "must rise"]),
    ("a range without a window", swap("      sde_window_size: 2\n", ""), 11, ["sde_window_range", "no effect"]),
    ("21 misspelt reward", swap("rewards: shapes", "rewards: shaps"), 21, ["'shaps'", "did you mean 'shapes'"]),
    ("22 a reward twice", swap("rewards: shapes", "rewards: [shapes, shapes]"), 21, ["rewards", "shapes is given twice"]),
    ("23 no rewards", swap("    rewards: shapes\n", ""), 18, ["rewards", "learns from rewards"]),
    ("a weight of NaN", swap("shapes: 1.0", "shapes: .nan"), 14, ["weight", "finite"]),
    ("a weight of 0", swap("shapes: 1.0", "shapes: 0"), 14, ["weight", "greater than 0"]),
    ("groups that do not divide", swap("batch_size: 16, steps", "batch_size: 18, steps"), 16, ["train.batch_size", "16 or 20"]),
    ("steps that do not divide", swap("{steps: 8, batch_size: 16, steps_per_batch", "{steps: 9, batch_size: 16, steps_per_batch"), 16, ["steps", "8 or 10"]),
    ("a checkpoint within a batch", swap("checkpoint_every: 4", "checkpoint_every: 3"), 16, ["checkpoint_every", "2 or 4"]),
    ("more steps than samples", swap("steps_per_batch: 2", "steps_per_batch: 20"), 16, ["steps_per_batch", "batch_size"]),
    ("images for an online stage", swap("data: {prompts: {type: shapes, count: 12}, resolution: 16}\n    rewards: shapes", "data: {type: shapes, images: 9}\n    rewards: shapes"), 20, ["data", "diffusion_nft needs prompts, and data of type 'shapes' give images"]),
    ("prompts for sft", swap("{type: diffusion_nft, group_size: 4, adv_mode: all, solver: dpm2}", "{type: sft}").replace("    rewards: shapes\n", ""), 20, ["data", "sft needs images, and data of type 'prompts' give prompts: type 'images' or 'shapes'"]),
    ("rewards for sft", swap("{type: diffusion_nft, group_size: 4, adv_mode: all, solver: dpm2}\n    data: {prompts: {type: shapes, count: 12}, resolution: 16}", "{type: sft}\n    data: {type: shapes, images: 9}"), 21, ["rewards", "no effect"]),
    ("a reference that is not there", swap("reference: base", "reference: soar"), 15, ["reference", "'soar'", "'base'"]),
    ("a reference without a KL", swap("sde_type: flow_sde", "beta: 0"), 15, ["reference", "no effect"]),
    ("a reference to itself", swap("reference: base", "reference: grpo"), 15, ["reference", "'grpo'"]),
    ("a monitor without an evaluation", GOOD[: GOOD.index("evaluation:")], 17, ["monitor", "no evaluation"]),
    ("a monitor within a batch", swap("{every: 4,", "{every: 3,"), 17, ["monitor.every", "steps_per_batch"]),
    ("a best one without a monitor", swap("batch_size: 16, sample_every", "batch_size: 16, keep_best: shapes, sample_every"), 22, ["keep_best", "add 'monitor: {}'"]),
    ("the best by an unknown score", swap("checkpoint_every: 4", "checkpoint_every: 4, keep_best: shaps"), 16, ["keep_best", "'shaps'", "did you mean 'shapes'"]),
    ("checkpoints kept that are not written", swap("checkpoint_every: 4", "checkpoint_every: 4, keep_every: 6"), 16, ["keep_every", "4 or 8"]),
    ("a misspelt action", swap("reward_hacking: stop", "reward_hacking: halt"), 17, ["reward_hacking", "'halt'", "rollback"]),
    ("a misspelt mode", swap("adv_mode: all", "adv_mode: al"), 19, ["adv_mode", "did you mean 'all'"]),
    ("a misspelt solver", swap("solver: dpm2", "solver: dmp2"), 19, ["solver", "did you mean 'dpm2'"]),
    ("an unknown decay", swap("adv_mode: all", "decay_type: 3"), 19, ["decay_type", "0, 1, 2"]),
    ("published prompts that are not there", swap("data: {prompts: {type: shapes, count: 12}, resolution: 16}\n    rewards: shapes", "data: {prompts: x/ocr/train.txt, resolution: 16}\n    rewards: shapes"), 20, ["no file 'x/ocr/train.txt'", "published as github.com/yifan123/flow_grpo, dataset/ocr/train.txt"]),
    ("prompts that are not there", swap("data: {prompts: {type: shapes, count: 12}, resolution: 16}\n    rewards: shapes", "data: {prompts: no.txt, resolution: 16}\n    rewards: shapes"), 20, ["no file 'no.txt'"]),
    ("a resolution that does not fit", swap("resolution: 16}\n    rewards: shapes", "resolution: 18}\n    rewards: shapes"), 20, ["18", "16 or 20"]),
    ("a function that is not there", swap("rewards: shapes", "rewards: 'no_such_module:score'"), 21, ["no module 'no_such_module'"]),
    ("a function without a name", swap("rewards: shapes", "rewards: 'module:'"), 21, ["function"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_faulty_online_recipe_is_refused_by_line_and_remedy(text, line, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert message.startswith(f"r.yaml:{line}: "), message
    for word in words:
        assert word in message, message


def test_the_good_recipe_is_good_and_loads_again():
    recipe = parse_recipe(GOOD, "r.yaml")
    assert [r.weight for r in recipe.stages[0].rewards] == [1.0, 0.5]
    assert parse_recipe(dump_recipe(recipe), "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("form", "kinds"),
    [
        ("shapes", ["shapes"]),
        ("{shapes: 1.0, jpeg_compressibility: 2}", ["shapes", "jpeg_compressibility"]),
        ("{'os.path:getsize': 2}", ["callable"]),
        ("['os.path:getsize', shapes]", ["callable", "shapes"]),
    ],
)
def test_rewards_in_short_forms(form, kinds):
    recipe = parse_recipe(swap("rewards: shapes", f"rewards: {form}"), "r.yaml")
    assert [reward.type for reward in recipe.stages[1].rewards] == kinds


@pytest.mark.parametrize("alarm", ["reward_hacking", "spread_collapse"])
def test_an_alarm_that_cannot_sound_is_refused(alarm):
    text = HEAD + "stages:\n" + stage("sft", monitor=f"{{every: 2, {alarm}: stop}}") + EVALUATION
    with pytest.raises(
        RecipeError, match=rf"monitor\.{alarm}.*sft has no rewards, so this alarm never sounds"
    ):
        parse_recipe(text, "r.yaml")
    parse_recipe(text.replace(": stop", ": warn"), "r.yaml")
