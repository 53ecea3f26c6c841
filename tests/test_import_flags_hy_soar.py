"""HY-SOAR's flags become the recipe of its published command."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from imported import SHORT, SOAR, recipe_of, stage_of, told

from posttrain.errors import PosttrainError
from posttrain.importing.trainers import translate
from posttrain.recipe.file import load_recipe, parse_recipe


def test_hy_soars_published_command():
    found = translate("hy-soar", SOAR)
    recipe = parse_recipe(found.text, "recipe", checks=False)
    (stage,) = recipe.stages
    assert (recipe.name, recipe.seed, recipe.tf32) == ("sd3.5m_soar", 42, True)
    assert (stage.train.batch_size, stage.train.steps, stage.train.learning_rate) == (32, 5000, 2e-5)
    assert (stage.train.weight_decay, stage.train.checkpoint_every) == (1e-2, 1000)
    assert (stage.train.precision, stage.train.gradient_checkpointing) == ("bf16", "full")
    assert stage.tune.type == "full"
    assert stage.data.resolution is None
    assert told(found.idle, "--resolution") == [
        "HY-SOAR does not read it: images have the bw and bh of their row, as here without data.resolution"
    ]
    shipped = load_recipe("sd35m-soar", checks=False).stages[0]
    assert stage.algorithm == shipped.algorithm
    assert not found.lost
    assert not found.unknown
    assert len(found.yours) == 3  # the model's folder, the list, the folder of images


def test_a_flag_that_is_left_out_has_the_other_trainers_default():
    recipe = recipe_of("hy-soar", SHORT, 2)
    train = recipe.stages[0].train
    assert (train.weight_decay, train.batch_size, train.precision) == (1e-4, 8, "fp32")
    assert (recipe.model.max_sequence_length, recipe.tf32) == (77, False)
    text = translate("hy-soar", SHORT, 2).text
    assert "weight_decay: 1e-4" in text
    assert "# default of --adam_weight_decay" in text


def test_scale_lr_scales():
    more = ["--scale_lr", "--learning_rate", "1e-6", "--gradient_accumulation_steps", "3"]
    assert recipe_of("hy-soar", [*SHORT, *more], 2).stages[0].train.learning_rate == pytest.approx(24e-6)


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        ("--sde_rollout_type cps --sde_noise_scale 0.3", ["--sde_noise_scale", "--sde_rollout_type"]),
        ("--num_rollout_paths 3 --sde_rollout_type sde --sde_noise_scale 0.3", ["--sde_noise_scale"]),
        ("--num_rollout_paths 3 --sde_rollout_type cps --sde_noise_scale 0.3", []),
        (
            "--weighting_scheme mode --logit_mean 0.2 --logit_std 2 --mode_scale 1",
            ["--logit_mean", "--logit_std"],
        ),
        ("--mode_scale 1.0 --logit_mean 0.2", ["--mode_scale"]),
    ],
)
def test_hy_soars_flags_that_do_nothing_are_told_and_left_out(words, idle):
    found = translate("hy-soar", [*SHORT, *words.split()], 1)
    told_idle = sorted(shown.split()[0] for shown, reason in found.idle if "no effect" in reason)
    assert told_idle == idle
    algorithm = stage_of(found).algorithm
    for flag, value in zip(words.split()[::2], words.split()[1::2], strict=True):
        if flag not in idle:
            assert str(getattr(algorithm, flag[2:])) in (value, f"{value}.0")


rate = st.floats(1e-12, 10, allow_nan=False)


@given(rate, st.integers(1, 64), st.integers(1, 8), st.integers(1, 16), st.integers(1, 10**6), rate)
def test_numbers_survive(learning_rate, each, accumulated, processes, steps, scale):
    words = [*SHORT, "--learning_rate", repr(learning_rate), f"--train_batch_size={each}", "--lambda_aux", repr(scale),
             f"--gradient_accumulation_steps={accumulated}", f"--max_train_steps={steps}"]  # fmt: skip
    (stage,) = recipe_of("hy-soar", words, processes).stages
    assert stage.train.learning_rate == learning_rate
    assert stage.train.batch_size == each * accumulated * processes
    assert (stage.train.steps, stage.algorithm.lambda_aux) == (steps, scale)


def test_what_posttrain_refuses_is_told_with_the_flag():
    with pytest.raises(PosttrainError, match=r"\(--cond_dropout_rate\): stages.0.algorithm.cond_dropout"):
        translate("hy-soar", [*SHORT, "--cond_dropout_rate", "3"], 1)
    with pytest.raises(PosttrainError, match=r"one of sigma_sqrt, logit_normal, mode, cosmap.*did you mean"):
        translate("hy-soar", [*SHORT, "--weighting_scheme", "logitnormal"], 1)
    with pytest.raises(PosttrainError, match="--processes N"):
        translate("hy-soar", SHORT)
    with pytest.raises(PosttrainError, match="no model that posttrain trains"):
        translate(
            "flow-grpo", ["config/grpo.py:geneval_sd3", "--config.pretrained.model=Qwen/Qwen-Image-Edit"]
        )


def test_a_bare_flag_is_for_switches_alone():
    with pytest.raises(PosttrainError, match="--seed needs a value"):
        translate("hy-soar", [*SHORT, "--seed"], 1)
