"""Flow-Factory's YAML files become recipes."""

import pytest
from imported import recipe_of, stage_of, told

from posttrain.errors import PosttrainError
from posttrain.importing.trainers import translate
from posttrain.recipe.file import parse_recipe

FACTORY = """
num_processes: 8
mixed_precision: "bf16"
data:
  datasets:
    - {name: default, dataset_dir: "dataset/pickscore", train: {weight: 1, max_dataset_size: 1024}, eval: {}}
model: {finetune_type: 'lora', lora_rank: 32, lora_alpha: 64, target_modules: "default", model_type: "sd3-5",
        model_name_or_path: "stabilityai/stable-diffusion-3.5-medium"}
log: {run_name: null, logging_backend: "none", save_freq: 20}
train:
  advantage_aggregation: 'sum'
  resolution: 512
  per_device_batch_size: 8
  unique_sample_num_per_epoch: 48
  gradient_accumulation_steps: auto
  ema_update_interval: 1
  seed: 42
eval: {resolution: 512, per_device_batch_size: 8, guidance_scale: 4.5, num_inference_steps: 40, eval_freq: 20, seed: 42}
rewards:
  - {name: "pick_score", reward_model: "PickScore", batch_size: 16, weight: 2}
eval_rewards:
  - {name: "pick_score", reward_model: "PickScore"}
optimizers:
  - {name: default, learning_rate: 3.0e-4, weight_decay: 1.0e-4, betas: [0.9, 0.999], eps: 1.0e-8, max_grad_norm: 1.0}
"""
"""Values of the examples for SD3.5 at 5f6cda1."""


def factory(tmp_path, **flags):
    (tmp_path / "f.yaml").write_text(FACTORY)
    words = [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
    return translate("flow-factory", [str(tmp_path / "f.yaml"), *words])


def test_flow_factorys_grpo(tmp_path):
    found = factory(
        tmp_path, train__trainer_type="grpo", train__group_size=24, train__num_inference_steps=10,
        train__guidance_scale=4.5, train__clip_range=1e-4, train__adv_clip_range=5.0, train__ema_decay=0.99,
        train__gradient_step_per_epoch=2, scheduler__dynamics_type="CPS", scheduler__noise_level=0.8,
        scheduler__num_sde_steps=2, scheduler__sde_steps=[1, 2, 3, 4, 5], train__kl_beta=0.001, train__kl_type="v-based",
    )  # fmt: skip
    recipe = parse_recipe(found.text, "recipe", checks=False)
    (stage,) = recipe.stages
    algorithm = stage.algorithm
    assert (algorithm.type, algorithm.sde_type, algorithm.noise_level) == ("flow_grpo", "cps", 0.8)
    assert (algorithm.sde_window_size, algorithm.sde_window_range) == (2, [1, 6])
    assert (algorithm.kl_type, algorithm.beta, algorithm.clip_range) == ("velocity_mse", 0.001, 1e-4)
    assert (stage.train.batch_size, stage.train.steps_per_batch) == (1152, 2)
    assert (stage.train.learning_rate, stage.train.ema) == (3e-4, 0.99)
    assert (stage.tune.rank, stage.tune.alpha) == (32, 64)
    assert stage.rewards[0].weight == 2
    assert recipe.evaluation.steps == 40
    assert told(found.lost, "data.datasets") == ["max_dataset_size: cut the file of prompts"]


TIMES = {"train__group_size": 16, "train__num_inference_steps": 14, "scheduler__dynamics_type": "ODE",
         "train__guidance_scale": 1.0, "train__gradient_step_per_epoch": 1}  # fmt: skip


def test_flow_factorys_nft(tmp_path):
    nft = factory(
        tmp_path, **TIMES, train__trainer_type="nft", train__nft_beta=1.0, train__off_policy=True, train__flat_steps=0,
        train__ema_decay_schedule="piecewise_linear", train__ramp_rate=0.001, train__ema_decay=0.5,
        train__num_train_timesteps=4, train__timestep_range=0.5,
    )  # fmt: skip
    algorithm = stage_of(nft).algorithm
    assert (algorithm.type, algorithm.decay_type, algorithm.trained_steps) == ("diffusion_nft", 1, 4)
    assert told(nft.lost, "train.timestep_range")


def test_flow_factorys_awm(tmp_path):
    algorithm = stage_of(factory(
        tmp_path, **TIMES, train__trainer_type="awm", train__awm_weighting="ghuber", train__clip_range=1,
        train__adv_clip_range=1.0, train__ema_kl_beta=1, train__ema_decay=0.3, train__ema_decay_schedule="linear",
        train__num_train_timesteps=6, train__time_sampling_strategy="discrete_wo_init", train__kl_beta=0.0001,
    )).algorithm  # fmt: skip
    assert (algorithm.train_timesteps, algorithm.clip_range, algorithm.ema_beta) == (6, 1, 1)
    assert (algorithm.advantage_max, algorithm.kl_ema_decay, algorithm.beta) == (1, 0.3, 0.0001)


def test_flow_factorys_dpo_and_sft(tmp_path):
    dpo = factory(
        tmp_path, **TIMES, train__trainer_type="dpo", train__beta=100.0, train__num_train_timesteps=1
    )
    algorithm = stage_of(dpo).algorithm
    assert (algorithm.type, algorithm.beta, algorithm.points_per_pair) == ("dpo_online", 100, 1)
    sft = factory(tmp_path, train__trainer_type="sft", train__gradient_accumulation_steps=2)
    assert stage_of(sft).train.batch_size == 8 * 2 * 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"train__trainer_type": "grpo", "scheduler__dynamics_type": "ODE"}, "no probability"),
        ({"train__trainer_type": "dgpo"}, "posttrain has no counterpart"),
    ],
)
def test_what_flow_factory_has_and_posttrain_has_not(tmp_path, flags, words):
    with pytest.raises(PosttrainError, match=words):
        factory(tmp_path, **flags)


def test_flow_factorys_gdpo_rewards_optimizers_and_steps(tmp_path):
    grpo = {"train__trainer_type": "grpo", "train__group_size": 24}
    found = factory(tmp_path, **grpo, train__advantage_aggregation="gdpo", scheduler__sde_steps=[1, 5])
    algorithm = stage_of(found).algorithm
    assert (algorithm.global_std, algorithm.reward_mixing) == (False, "advantages")
    assert "over the batch" in told(found.lost, "train.advantage_aggregation")[0]
    assert "also has steps 2, 3, 4" in told(found.lost, "scheduler.sde_steps")[0]
    two = "[{'reward_model': 'PickScore', 'weight': 2}, {'reward_model': 'PickScore'}]"
    (reward,) = stage_of(factory(tmp_path, **grpo, rewards=two)).rewards
    assert reward.weight == 3
    with pytest.raises(PosttrainError, match=r"optimizers\.frob 3"):
        factory(tmp_path, **grpo, optimizers="{'learning_rate': 1e-3, 'frob': 3}")


GRPO = FACTORY.replace("train:\n", "train:\n  trainer_type: grpo\n  group_size: 24\n")


@pytest.mark.parametrize(
    "command",
    [
        "ff-train f.yaml", "ff-train --num_processes 8 f.yaml", "/opt/bin/ff-train f.yaml --machine_rank 0 > log",
        "python -m flow_factory.cli f.yaml", "accelerate launch --num_processes 8 -m flow_factory.train f.yaml",
        "torchrun --nproc_per_node 8 src/flow_factory/train.py f.yaml",
    ],
)  # fmt: skip
def test_commands_name_their_file(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.yaml").write_text(GRPO)
    (tmp_path / "run.sh").write_text(f"{command} 2>&1\n")
    sft = ["--train.trainer_type=sft", "--train.gradient_accumulation_steps=2", "--num_processes=8"]
    assert recipe_of("flow-factory", ["run.sh", *sft]).stages[0].train.batch_size == 8 * 2 * 8
    words = command.partition(" >")[0].split()
    assert recipe_of("flow-factory", words).stages[0].train.batch_size == 1152


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("accelerate launch --num_processes 4 -m flow_factory.train f.yaml",
         "the launcher starts 4 processes, but num_processes is 8"),
        ("f.yaml ff-train g.yaml", "give 'f.yaml' or 'g.yaml', not both"),
        ("ff-train g.yaml", "num_processes is not given"),
        ("ff-train f.yaml stray", "'stray' is neither a flag"),
    ],
)  # fmt: skip
def test_commands_that_leave_something_open(tmp_path, monkeypatch, command, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.yaml").write_text(GRPO)
    (tmp_path / "g.yaml").write_text(GRPO.replace("num_processes: 8\n", ""))
    with pytest.raises(PosttrainError, match=words):
        translate("flow-factory", command.split())


def test_the_number_of_processes_that_the_user_says_settles_it(tmp_path):
    (tmp_path / "f.yaml").write_text(GRPO)
    words = ["accelerate", "launch", "--num_processes=4", "-m", "flow_factory.train", str(tmp_path / "f.yaml"),
             "--train.trainer_type=sft", "--train.gradient_accumulation_steps=1"]  # fmt: skip
    assert recipe_of("flow-factory", words, 4).stages[0].train.batch_size == 8 * 4


def test_one_target_module_is_a_list_of_one(tmp_path):
    found = factory(tmp_path, train__trainer_type="grpo", train__group_size=24, model__target_modules="to_q")
    assert stage_of(found).tune.targets == ["to_q"]


def test_what_is_lost_of_a_default_is_told(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "num_processes: 2\nmodel: {model_name_or_path: x/sd3, model_type: sd3-5, finetune_type: lora}\n"
        "train: {trainer_type: nft, group_size: 4}\nrewards: [{reward_model: pickscore}]\n"
    )
    differs = "\n".join(translate("flow-factory", [str(tmp_path / "c.yaml")]).differs)
    for words in ("target_modules is all", "dynamics_type is Flow-SDE", "timestep_range is 0.9", "is gdpo"):
        assert f"{words} there by default" in differs
