"""Commands and configurations of other trainers become recipes; what they say survives, or is told."""

import contextlib
import json
import math
import re

import pytest
from forked import ROOT, posttrain
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import PosttrainError
from posttrain.importing.command_line import parsed
from posttrain.importing.draft import Draft, text_of
from posttrain.importing.flags import BARE, Settings
from posttrain.importing.trainer import Start
from posttrain.importing.trainers import TRAINERS, translate
from posttrain.recipe.file import load_recipe, parse_recipe
from posttrain.recipe.positions import parse

SOAR = [
    "torchrun",
    "--nnodes=1",
    "--node_rank=0",
    "--nproc_per_node=8",
    "--master_addr=localhost",
    "--master_port=29522",
    "-m",
    "sora.train_soar_sd3_5m",
    "--pretrained_model_name_or_path",
    "/path/to/stable-diffusion-3.5-medium",
    "--jsonl_path",
    "/path/to/high_aesthetic.jsonl",
    "--image_dir",
    "/path/to/images",
    "--output_dir",
    "./output/sd3.5m_soar",
    "--resolution",
    "512",
    "--train_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
    "--max_train_steps",
    "5000",
    "--checkpointing_steps",
    "1000",
    "--seed",
    "42",
    "--learning_rate",
    "2e-5",
    "--lr_scheduler",
    "constant",
    "--lr_warmup_steps",
    "0",
    "--adam_weight_decay",
    "1e-2",
    "--max_grad_norm",
    "1.0",
    "--weighting_scheme",
    "logit_normal",
    "--mixed_precision",
    "bf16",
    "--dataloader_num_workers",
    "16",
    "--gradient_checkpointing",
    "--allow_tf32",
    "--report_to",
    "tensorboard",
    "--num_rollout_paths",
    "1",
    "--trajectory_length",
    "6",
    "--num_sampling_steps",
    "40",
    "--sde_rollout_type",
    "flow_sde",
    "--sde_noise_scale",
    "0.5",
    "--lambda_aux",
    "1.0",
    "--cfg_scale_sampling",
    "4.5",
]
"""The command of HY-SOAR's README at 0aec693, of which flags and values are facts."""
SHORT = ["--pretrained_model_name_or_path", "x/stable-diffusion-3.5", "--jsonl_path", "a.jsonl", "--image_dir", "i",
         "--max_train_steps", "10"]  # fmt: skip


def recipe_of(trainer, words, processes=None, **how):
    return parse_recipe(translate(trainer, words, processes, **how).text, "recipe", checks=False)


def told(pairs, flag):
    return [words for name, words in pairs if name.split()[0] == flag]


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
    ("trainer", "config", "shipped"),
    [
        ("flow-grpo", "config/grpo.py:geneval_sd3", "sd35m-grpo-geneval"),
        ("flow-grpo", "config/grpo.py:pickscore_sd3", "sd35m-grpo-pickscore"),
        ("flow-grpo", "config/grpo.py:pickscore_sd3_fast_nocfg", "sd35m-grpo-fast"),
        ("diffusion-nft", "config/nft.py:sd3_geneval", "sd35m-nft-geneval"),
        ("diffusion-nft", "config/nft.py:sd3_ocr", "sd35m-nft-ocr"),
        ("diffusion-nft", "config/nft.py:sd3_pickscore", "sd35m-nft-pickscore"),
        ("diffusion-nft", "config/nft.py:sd3_multi_reward", "sd35m-nft-multi"),
    ],
)
def test_published_configurations_give_the_shipped_recipes(trainer, config, shipped):
    (made,), (known,) = recipe_of(trainer, [config]).stages, load_recipe(shipped, checks=False).stages
    assert made.algorithm == known.algorithm
    assert made.tune == known.tune
    assert made.rewards == known.rewards
    for field in (
        "batch_size",
        "steps_per_batch",
        "learning_rate",
        "weight_decay",
        "betas",
        "ema",
        "precision",
    ):
        assert getattr(made.train, field) == getattr(known.train, field), field
    assert made.monitor.every % made.train.steps_per_batch == 0


@pytest.mark.parametrize(
    ("config", "batch", "per_batch"),
    [("general_ocr_sd3_4gpu", 256, 2), ("general_ocr_sd3_1gpu", 64, 2), ("pickscore_qwenimage_8gpu", 512, 2)],
)
def test_flow_grpos_geometry(config, batch, per_batch):
    train = recipe_of("flow-grpo", [f"config/grpo.py:{config}"]).stages[0].train
    assert (train.batch_size, train.steps_per_batch) == (batch, per_batch)
    again = recipe_of("flow-grpo", [f"config/grpo.py:{config}"], 16).stages[0].train
    assert again.batch_size % 16 == 0


@pytest.mark.parametrize("trainer", ["flow-grpo", "diffusion-nft"])
def test_every_published_configuration_is_a_recipe(trainer):
    for name in TRAINERS[trainer].published:
        found = translate(trainer, [f"config/x.py:{name}"])
        assert not found.unknown
        assert not [words for _, words in found.lost if words.startswith("no field")]


def test_the_launch_commands_of_readmes():
    grpo = "accelerate launch --config_file a.yaml --num_processes=4 --main_process_port 29501 scripts/train_sd3.py"
    words = [*grpo.split(), "--config", "config/grpo.py:general_ocr_sd3_4gpu", "--config.train.beta=0.01"]
    (stage,) = recipe_of("flow-grpo", words).stages
    assert (stage.algorithm.beta, stage.train.batch_size) == (0.01, 256)
    nft = [
        "torchrun",
        "--nproc_per_node=4",
        "scripts/train_nft_sd3.py",
        "--config",
        "config/nft.py:sd3_geneval",
    ]
    assert recipe_of("diffusion-nft", nft).stages[0].train.batch_size == 576


def test_the_script_says_whether_there_is_a_window():
    config = ["--config", "config/grpo.py:pickscore_sd3_fast_nocfg"]
    windowed = recipe_of("flow-grpo", ["python", "scripts/train_sd3_fast.py", *config]).stages[0].algorithm
    assert (windowed.sde_window_size, windowed.sde_window_range) == (3, [0, 5])
    whole = recipe_of("flow-grpo", ["python", "scripts/train_sd3.py", *config]).stages[0].algorithm
    assert (whole.sde_window_size, whole.timestep_fraction) == (0, 0.99)
    guarded = (
        recipe_of("flow-grpo", ["python", "scripts/train_sd3_GRPO_Guard.py", *config]).stages[0].algorithm
    )
    assert guarded.grpo_guard


BASE = """import ml_collections
def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 7
    config.sample = sample = ml_collections.ConfigDict()
    sample.guidance_scale = 4.5
    sample.num_batches_per_epoch = 2
    config.train = ml_collections.ConfigDict()
    config.train.learning_rate = 1e-4
    config.pretrained = ml_collections.ConfigDict()
    return config
"""
OWN = """import os
base = imp.load_source("base", "base.py")
def _half(n, by=2):
    return n // by if n > 1 else 1
def mine():
    n_gpus = 2
    config = base.get_config()
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    config.dataset = os.path.join(os.getcwd(), "dataset/ocr")
    config.resolution = 512
    size = 10
    while size > 8:
        size -= 1
    config.sample.train_batch_size = size
    config.sample.num_image_per_prompt = 4
    config.sample.num_batches_per_epoch = int(8 / (n_gpus * size / 8))
    assert config.sample.num_batches_per_epoch % 2 == 0
    config.train.gradient_accumulation_steps = _half(config.sample.num_batches_per_epoch)
    config.sample.num_steps = 10
    config.train.timestep_fraction = 0.99
    config.run_name = f"mine-{n_gpus}"
    config.reward_fn = {"ocr": 1.0, "deqa": 0.5}
    return config
def get_config(name):
    return globals()[name]()
def strange():
    config = base.get_config()
    config.seed = open("/etc/passwd").read()
    return config
"""


def test_a_configuration_of_ones_own_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "grpo.py").write_text(OWN)
    found = translate("flow-grpo", ["grpo.py:mine", "--config.sample.noise_level=0.9"])
    recipe = parse_recipe(found.text, "recipe", checks=False)
    (stage,) = recipe.stages
    assert (recipe.name, recipe.seed) == ("mine-2", 7)
    assert (stage.train.batch_size, stage.train.steps_per_batch) == (8 * 4 * 2, 2)
    assert (stage.train.learning_rate, stage.algorithm.noise_level) == (1e-4, 0.9)
    assert {reward.label: reward.weight for reward in stage.rewards} == {"ocr": 1.0, "deqa": 0.5}
    assert "my_rewards" in told(found.lost, "config.reward_fn")[0]
    with pytest.raises(PosttrainError, match=r"grpo\.py:28: \"open\('/etc/passwd'\)"):
        translate("flow-grpo", ["grpo.py:strange"])
    with pytest.raises(PosttrainError, match="did you mean 'mine'"):
        translate("flow-grpo", ["grpo.py:mime"])


@pytest.mark.parametrize(
    "line",
    ["while True:\n        x = 1", "x = 9 ** 9 ** 9", "x = 'a' * 999", "import os\n    os.remove('a')"],
)
def test_a_configuration_that_does_more_is_refused(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text(f"def mine():\n    {line}\n    return x\n")
    with pytest.raises(PosttrainError, match=r"a\.py"):
        translate("diffusion-nft", ["a.py:mine"])


PLAIN = """import ml_collections
LR = 10**-4
SIZES = [2, 4]
def twice(x=1, *, by=2):
    return x * by
def deep(x):
    return deep(x)
def mine():
    config = ml_collections.ConfigDict()
    config.sample = ml_collections.ConfigDict()
    config.train = ml_collections.ConfigDict()
    config.pretrained = ml_collections.ConfigDict()
    config.pretrained.model = "stabilityai/stable-diffusion-3.5-medium"
    config.dataset = "d"
    config.reward_fn = {"pickscore": 1.0}
    config.sample.num_image_per_prompt = 2
    config.sample.train_batch_size = 2
BODY
    return config
"""


def plain_config(folder, body):
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (folder / "x.py").write_text(PLAIN.replace("BODY\n", lines))
    return recipe_of("flow-grpo", [f"{folder}/x.py:mine"], 1)


@pytest.mark.parametrize(
    "body",
    [
        "if 1 < 'a':\n    pass",
        "x = 1 in 5",
        "x = -'a'",
        "x = {[1]: 2}",
        "x = int(1e400)",
        "x = round(1e400)",
        "x = deep(1)",
        f"x = {'1+' * 5000}1",
        f"x = {'-' * 3000}1",
        "x = ~3",
        "x = twice(**dict(x=3))",
        "x = twice(1, 2)",
        "x = twice(z=3)",
        "x = f'{3:03d}'",
        "x = '%1000d' % 5",
        "while 1 > 2:\n    pass\nelse:\n    config.seed = 5",
        "for i in [1]:\n    pass\nelse:\n    config.seed = 5",
        "for i in range(10**9):\n    pass",
        "x = list(range(10**9))",
        "x = 'a' * 2",
        "x = 'a'\nwhile True:\n    x = x + x",
        "x = UNKNOWN",
        "x = config['nothing']",
        "break",
        "config.reward_fn = {1: 'x'}",
        "config.reward_fn = {'a b': 1, 'a.b': 2, 'a-b': 3}",
    ],
)
def test_what_a_configuration_cannot_have_is_told_without_a_traceback(tmp_path, body):
    match = r"reward_fn" if "reward_fn" in body else r"x\.py(:\d+: |.* is not valid Python)"
    with pytest.raises(PosttrainError, match=match):
        plain_config(tmp_path, body)


@pytest.mark.parametrize(
    ("body", "rate", "seed"),
    [
        ("config.train.learning_rate = LR", 1e-4, 42),
        ("config['seed'] = 3\nconfig['train']['learning_rate'] = 1e-3", 1e-3, 3),
        ("config.train.learning_rate = None or 1e-5\nconfig.seed = 2 and 4", 1e-5, 4),
        ("config.seed = 1\nfor i in range(3):\n    config.seed += i", 3e-4, 4),
        (
            "n = 0\nfor i in [1, 5, 7]:\n    if i == 1:\n        continue\n    n = i\n    break\nconfig.seed = n",
            3e-4,
            5,
        ),
        ("for a, b in [(1, 2), (3, 4)]:\n    config.seed = a * b", 3e-4, 12),
        ("config.seed = twice(by=5)", 3e-4, 5),
        ("config.seed = SIZES[1]", 3e-4, 4),
        ("config.reward_fn = {1: 1.0}", 3e-4, 42),
    ],
)
def test_what_a_configuration_may_have(tmp_path, body, rate, seed):
    if "{1:" in body:
        with pytest.raises(PosttrainError, match=r"my_rewards:1"):
            plain_config(tmp_path, body)
        return
    recipe = plain_config(tmp_path, body)
    assert (recipe.stages[0].train.learning_rate, recipe.seed) == (rate, seed)


def test_what_ended_in_a_traceback_or_an_address_names_what_is_wrong(tmp_path):
    with pytest.raises(PosttrainError, match="--config needs a value"):
        translate("flow-grpo", ["--config"])
    (tmp_path / "config.env").write_text('TRAINER_EXTRA_ARGS="--a=\'6"\n')
    with pytest.raises(PosttrainError, match=r"TRAINER_EXTRA_ARGS of config\.env cannot be read"):
        translate("simpletuner", [str(tmp_path / "config.env")])
    (tmp_path / "deep.py").write_text(f"x = {'(' * 300}1{')' * 300}\n")
    with pytest.raises(PosttrainError, match=r"deep\.py is not valid Python"):
        translate("flow-grpo", [f"{tmp_path}/deep.py:mine"], 1)


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


def test_flow_factorys_other_algorithms(tmp_path):
    times = {"train__group_size": 16, "train__num_inference_steps": 14, "scheduler__dynamics_type": "ODE",
             "train__guidance_scale": 1.0, "train__gradient_step_per_epoch": 1}  # fmt: skip
    nft = factory(
        tmp_path, **times, train__trainer_type="nft", train__nft_beta=1.0, train__off_policy=True, train__flat_steps=0,
        train__ema_decay_schedule="piecewise_linear", train__ramp_rate=0.001, train__ema_decay=0.5,
        train__num_train_timesteps=4, train__timestep_range=0.5,
    )  # fmt: skip
    algorithm = parse_recipe(nft.text, "recipe", checks=False).stages[0].algorithm
    assert (algorithm.type, algorithm.decay_type, algorithm.trained_steps) == ("diffusion_nft", 1, 4)
    assert told(nft.lost, "train.timestep_range")
    awm = factory(
        tmp_path, **times, train__trainer_type="awm", train__awm_weighting="ghuber", train__clip_range=1,
        train__adv_clip_range=1.0, train__ema_kl_beta=1, train__ema_decay=0.3, train__ema_decay_schedule="linear",
        train__num_train_timesteps=6, train__time_sampling_strategy="discrete_wo_init", train__kl_beta=0.0001,
    )  # fmt: skip
    algorithm = parse_recipe(awm.text, "recipe", checks=False).stages[0].algorithm
    assert (algorithm.train_timesteps, algorithm.clip_range, algorithm.ema_beta) == (6, 1, 1)
    assert (algorithm.advantage_max, algorithm.kl_ema_decay, algorithm.beta) == (1, 0.3, 0.0001)
    dpo = factory(
        tmp_path, **times, train__trainer_type="dpo", train__beta=100.0, train__num_train_timesteps=1
    )
    algorithm = parse_recipe(dpo.text, "recipe", checks=False).stages[0].algorithm
    assert (algorithm.type, algorithm.beta, algorithm.points_per_pair) == ("dpo_online", 100, 1)
    sft = factory(tmp_path, train__trainer_type="sft", train__gradient_accumulation_steps=2)
    assert parse_recipe(sft.text, "recipe", checks=False).stages[0].train.batch_size == 8 * 2 * 8
    with pytest.raises(PosttrainError, match="no probability"):
        factory(tmp_path, train__trainer_type="grpo", scheduler__dynamics_type="ODE")
    with pytest.raises(PosttrainError, match="posttrain has no counterpart"):
        factory(tmp_path, train__trainer_type="dgpo")


def test_flow_factorys_gdpo_rewards_optimizers_and_steps(tmp_path):
    grpo = {"train__trainer_type": "grpo", "train__group_size": 24}
    found = factory(tmp_path, **grpo, train__advantage_aggregation="gdpo", scheduler__sde_steps=[1, 5])
    algorithm = parse_recipe(found.text, "recipe", checks=False).stages[0].algorithm
    assert (algorithm.global_std, algorithm.reward_mixing) == (False, "advantages")
    assert "over the batch" in told(found.lost, "train.advantage_aggregation")[0]
    assert "also has steps 2, 3, 4" in told(found.lost, "scheduler.sde_steps")[0]
    two = "[{'reward_model': 'PickScore', 'weight': 2}, {'reward_model': 'PickScore'}]"
    (reward,) = (
        parse_recipe(factory(tmp_path, **grpo, rewards=two).text, "recipe", checks=False).stages[0].rewards
    )
    assert reward.weight == 3
    with pytest.raises(PosttrainError, match=r"optimizers\.frob 3"):
        factory(tmp_path, **grpo, optimizers="{'learning_rate': 1e-3, 'frob': 3}")


def test_diffusion_nfts_micro_batch_makes_optimizer_steps():
    config = "config/nft.py:sd3_geneval"
    train = recipe_of("diffusion-nft", [config, "--config.train.batch_size=3"]).stages[0].train
    assert (train.batch_size, train.steps_per_batch) == (1152, 3)
    more = ["--config.train.batch_size=3", "--config.train.gradient_accumulation_steps=48"]
    assert recipe_of("diffusion-nft", [config, *more]).stages[0].train.steps_per_batch == 1
    with pytest.raises(PosttrainError, match="must divide a process's 144 samples"):
        translate("diffusion-nft", [config, "--config.train.batch_size=5"])


def test_a_file_of_another_trainer_is_refused(tmp_path):
    for trainer, name in (
        ("hy-soar", "x.py"),
        ("simpletuner", "c.yaml"),
        ("flow-factory", "c.json"),
        ("hy-soar", "x.toml"),
    ):
        (tmp_path / name).write_text("{}")
        with pytest.raises(PosttrainError, match="file that import-flags reads"):
            translate(trainer, [str(tmp_path / name)])
    with pytest.raises(PosttrainError, match="not both"):
        translate("flow-grpo", ["config/grpo.py:geneval_sd3", "--config", "config/grpo.py:pickscore_sd3"])


def test_what_is_not_read_of_simpletuners_data_sets_is_told(tmp_path):
    backend = [
        {
            "id": "a",
            "instance_data_dir": "images",
            "repeats": 5,
            "cache_dir_vae": "c",
            "crop": True,
            "crop_style": "face",
        },
        {"id": "b", "instance_data_dir": "more"},
    ]
    (tmp_path / "b.json").write_text(json.dumps(backend))
    words = [
        "--model_family=sd3",
        "--model_type=lora",
        "--max_train_steps=3",
        f"--data_backend_config={tmp_path}/b.json",
    ]
    found = translate("simpletuner", words)
    lost = [name for name, _ in found.lost]
    for part in ("a: repeats 5", "a: crop_style face", ": b"):
        assert any(name.endswith(part) for name in lost), (part, lost)
    assert any(name.endswith("cache_dir_vae c") for name, _ in found.idle)
    for given_path, made in (
        ("foo.safetensors", "./"),
        ("a/b.safetensors", "./a"),
        ("/a/b.safetensors", "/a"),
    ):
        text = translate("simpletuner", [*words, f"--init_lora={given_path}"]).text
        assert re.search(rf'start_from: "?{made}"? ', text)


SIMPLE = {
    "base_model_precision": "int8-quanto", "checkpointing_steps": 50, "data_backend_config": "config/backend.json",
    "disable_bucket_pruning": True, "flow_schedule_shift": 3, "grad_clip_method": "value", "lora_alpha": 128,
    "gradient_checkpointing": True, "learning_rate": 1e-4, "lora_rank": 128, "lora_type": "standard",
    "lr_scheduler": "constant", "max_train_steps": 100, "mixed_precision": "bf16", "model_family": "sd3",
    "model_type": "lora", "num_train_epochs": 0, "optimizer": "adamw_bf16", "output_dir": "output/sd3.peft-lora",
    "report_to": "tensorboard", "seed": 42, "train_batch_size": 3, "use_ema": False,
    "validation_guidance_skip_layers": [7, 8, 9], "validation_prompt": "A photo of a cat", "validation_steps": 50,
}  # fmt: skip
"""Values of config/examples/sd3.peft-lora/config.json at 0de7f0b, and int8."""


def test_simpletuners_json(tmp_path):
    (tmp_path / "config").mkdir()
    backend = [
        {"id": "text", "dataset_type": "text_embeds"},
        {"id": "a", "instance_data_dir": "images", "resolution": 1.0, "resolution_type": "area", "crop": True,
         "crop_style": "center", "caption_strategy": "textfile"},
    ]  # fmt: skip
    (tmp_path / "config" / "backend.json").write_text(json.dumps(backend))
    (tmp_path / "config" / "config.json").write_text(json.dumps({f"--{k}": v for k, v in SIMPLE.items()}))
    words = [
        str(tmp_path / "config" / "config.json"),
        "--gradient_accumulation_steps=4",
        "--num_processes",
        "2",
    ]
    found = translate("simpletuner", words)
    recipe = parse_recipe(found.text, "recipe", checks=False)
    (stage,) = recipe.stages
    assert str(recipe.model.path) == "stabilityai/stable-diffusion-3.5-medium"
    assert (stage.tune.rank, stage.tune.alpha, stage.tune.base) == (128, 128, "int8")
    assert (stage.train.batch_size, stage.train.steps, stage.train.learning_rate) == (24, 100, 1e-4)
    assert (stage.data.images.as_posix(), stage.data.resolution, stage.data.crop) == (
        "images",
        1024,
        "center",
    )
    assert (stage.train.checkpoint_every, stage.train.sample_every) == (50, 50)
    assert (stage.train.weight_decay, stage.train.max_grad_norm) == (1e-2, 2.0)
    assert {name.split()[0] for name, _ in found.lost} == {"--grad_clip_method", "--validation_prompt"}


def test_simpletuners_environment(tmp_path):
    (tmp_path / "config.env").write_text(
        "export MODEL_TYPE='lora'\nexport STABLE_DIFFUSION_3=true\nFLUX=false\n"
        'export MODEL_NAME="stabilityai/stable-diffusion-3.5-large"  # large\nexport MAX_NUM_STEPS=3000\n'
        "export LEARNING_RATE=8e-7\nexport TRAIN_BATCH_SIZE=10\nexport RESOLUTION=512\n"
        "export MINIMUM_RESOLUTION=$RESOLUTION\nexport LR_SCHEDULE=polynomial\nexport LR_WARMUP_STEPS=100\n"
        'export TRAINER_EXTRA_ARGS="--lora_rank=8 --caption_dropout_probability 0.1"\nexport USE_EMA=true\n'
        "export EMA_DECAY=0.999\nexport PURE_BF16=true\nexport TRAINING_NUM_PROCESSES=2\n"
    )
    found = translate("simpletuner", [str(tmp_path / "config.env")])
    recipe = parse_recipe(found.text, "recipe", checks=False)
    (stage,) = recipe.stages
    assert (stage.train.learning_rate, stage.train.batch_size, stage.train.steps) == (8e-7, 20, 3000)
    assert (stage.tune.rank, stage.tune.alpha, stage.algorithm.cond_dropout) == (8, 8, 0.1)
    assert (stage.train.schedule, stage.train.warmup_steps, stage.train.ema) == ("linear", 100, 0.999)
    assert told(found.lost, "--lr_scheduler")


STARTS = {
    "hy-soar": SHORT,
    "flow-grpo": ["--config=config/grpo.py:general_ocr_sd3_1gpu"],
    "diffusion-nft": ["--config=config/nft.py:sd3_geneval"],
    "flow-factory": ["--train.trainer_type=TYPE", "--train.group_size=4", "--rewards", '{"reward_model": "PickScore"}',
                     "--model.model_type=sd3", "--model.model_name_or_path=a/stable-diffusion-3.5",
                     "--scheduler.dynamics_type=DYNAMICS", "--model.finetune_type=TUNE"],
    "simpletuner": ["--model_family=sd3", "--max_train_steps=10", "--model_type=TUNE"],
}  # fmt: skip
VARIANTS = {
    "flow-factory": [
        {"TYPE": kind, "DYNAMICS": dynamics, "TUNE": tune}
        for kind, dynamics, tune in (("grpo", "CPS", "lora"), ("nft", "ODE", "full"), ("awm", "ODE", "lora"),
                                     ("dpo", "ODE", "lora"), ("sft", "ODE", "full"))
    ],
    "simpletuner": [{"TUNE": "lora"}, {"TUNE": "full"}],
}  # fmt: skip


FITTING = {
    "sample.num_image_per_prompt": 8, "sample.train_batch_size": 24, "sample.num_batches_per_epoch": 16,
    "train.group_size": 2, "train.unique_sample_num_per_epoch": 16, "train.gradient_accumulation_steps": 2,
    "num_epochs": 10,
}  # fmt: skip
OTHERWISE = {("diffusion-nft", "sample.train_batch_size"): 18}
"""Values for flags whose default does not fit the others of STARTS."""


def filled(words, names):
    for name, value in names.items():
        words = [word.replace(name, value) for word in words]
    return words


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_flag_is_dropped_in_silence(trainer):
    """Each flag of the tables, given with its default, has a field, a reason or a nearest thing."""
    table = TRAINERS[trainer].table
    for names in VARIANTS.get(trainer, [{}]):
        start = filled(STARTS[trainer], names)
        taken = {word.lstrip("-").partition("=")[0] for word in start if word.startswith("--")}
        for name, flag in table.items():
            if name in taken or flag.default in (None, "") or not flag.translated:
                continue
            value = OTHERWISE.get((trainer, name), FITTING.get(name, flag.default))
            found = translate_with(trainer, start, name, value)
            accounts = [*found.translated, *found.idle, *found.lost]
            spelled = f"{TRAINERS[trainer].prefix}{name}"
            mine = [words for shown, words in accounts if shown.split()[0] == spelled]
            assert mine, spelled
            assert not [words for words in mine if words.startswith("no field")], (spelled, names)


def translate_with(trainer, start, name, value):
    prefix = "config." if trainer in ("flow-grpo", "diffusion-nft") else ""
    flag = f"--{prefix}{name}"
    return translate(trainer, [*start, f"{flag}={value}"], 2)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_unknown_flag_is_named_with_a_hint(trainer):
    name = next(n for n, flag in TRAINERS[trainer].table.items() if "learning_rate" in n)
    prefix = "config." if trainer in ("flow-grpo", "diffusion-nft") else ""
    start = filled(STARTS[trainer], VARIANTS.get(trainer, [{}])[0])
    wrong = f"--{prefix}{name.replace('learning', 'learnng')}=1"
    with pytest.raises(PosttrainError, match=f"(?s)learnng.*did you mean '{name}'"):
        translate(trainer, [*start, wrong], 1)
    found = translate(trainer, [*start, wrong], 1, lenient=True)
    assert "learnng" in found.unknown[0]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("value", ["abc", "nan", "inf", "[1, 2]"])
def test_a_wrong_value_is_refused(trainer, value):
    name = next(n for n, flag in TRAINERS[trainer].table.items() if "learning_rate" in n)
    prefix = "config." if trainer in ("flow-grpo", "diffusion-nft") else ""
    start = filled(STARTS[trainer], VARIANTS.get(trainer, [{}])[0])
    with pytest.raises(PosttrainError, match=r"learning_rate is a number, not"):
        translate(trainer, [*start, f"--{prefix}{name}={value}"], 1)


def test_what_posttrain_refuses_is_told_with_the_flag():
    with pytest.raises(PosttrainError, match=r"\(--cond_dropout_rate\): stages.0.algorithm.cond_dropout"):
        translate("hy-soar", [*SHORT, "--cond_dropout_rate", "3"], 1)
    with pytest.raises(PosttrainError, match=r"one of sigma_sqrt, logit_normal, mode, cosmap.*did you mean"):
        translate("hy-soar", [*SHORT, "--weighting_scheme", "logitnormal"], 1)
    with pytest.raises(PosttrainError, match="--processes N"):
        translate("hy-soar", SHORT)
    with pytest.raises(PosttrainError, match="no model that posttrain trains"):
        translate("flow-grpo", [*STARTS["flow-grpo"], "--config.pretrained.model=Qwen/Qwen-Image-Edit"])


def test_a_script_with_variables_and_its_faults(tmp_path):
    (tmp_path / "run.sh").write_text(
        "#!/bin/bash\nexport LR=3e-6\nGPUS=4\n# torchrun -m sora.train_soar_sd3_5m --seed 1\n"
        f"torchrun --nproc_per_node=$GPUS -m sora.train_soar_sd3_5m \\\n  --learning_rate ${{LR}} {' '.join(SHORT)}\n"
    )
    train = recipe_of("hy-soar", [str(tmp_path / "run.sh"), "--train_batch_size", "2"]).stages[0].train
    assert (train.learning_rate, train.batch_size) == (3e-6, 8)
    (tmp_path / "none.sh").write_text("echo hello\n")
    with pytest.raises(PosttrainError, match="has no command of HY-SOAR"):
        translate("hy-soar", [str(tmp_path / "none.sh")])
    (tmp_path / "two.sh").write_text(
        "python train_soar_sd3_5m.py --seed 1\npython train_soar_sd3_5m.py --seed 2\n"
    )
    with pytest.raises(PosttrainError, match="has 2 commands"):
        translate("hy-soar", [str(tmp_path / "two.sh")])
    with pytest.raises(PosttrainError, match="no file"):
        translate("hy-soar", [str(tmp_path / "lost.sh")])
    with pytest.raises(PosttrainError, match="did you mean 'hy-soar'"):
        translate("hy-sore", SHORT)


COMMAND = f"torchrun --nproc_per_node=1 -m sora.train_soar_sd3_5m --learning_rate $LR {' '.join(SHORT)}\n"


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("if true; then LR=1e-5; else LR=2e-5; fi", "command 1: 'LR=1e-5' is set under a condition"),
        ("for LR in 1 2; do\nLR=3e-5\ndone", "command 2: 'LR=3e-5' is set under a condition or in a loop"),
        ("LR=1e-5; LR+=0", r"'LR\+=0;?' adds to a variable"),
        ("echo if", r"'\$LR' has a variable that the script does not set"),
        ("LR=${RATE}", r"'\$\{RATE\}' has a variable that the script does not set"),
    ],
)
def test_what_a_script_may_not_leave_open(tmp_path, before, words):
    (tmp_path / "run.sh").write_text(f"{before}\n{COMMAND}")
    with pytest.raises(PosttrainError, match=words):
        translate("hy-soar", [str(tmp_path / "run.sh")])


@pytest.mark.parametrize(
    "before", ["LR=${RATE:-3e-6}", "if true; then\necho\nfi\nLR=3e-6", "echo if\nexport LR=3e-6"]
)
def test_variables_of_a_script_have_defaults_and_follow_conditions(tmp_path, before):
    (tmp_path / "run.sh").write_text(f"{before}\n{COMMAND}")
    assert recipe_of("hy-soar", [str(tmp_path / "run.sh")]).stages[0].train.learning_rate == 3e-6


def test_options_of_the_launcher_are_told():
    words = ["accelerate", "launch", "--num_processes=2", "--mixed_precision", "bf16", "--main_process_port=1",
             "--fsdp_version", "2", "--config_file", "a.yaml", "-m", "sora.train_soar_sd3_5m", *SHORT]  # fmt: skip
    found = translate("hy-soar", words)
    lost = dict(found.lost)
    assert lost["the launcher's --mixed_precision bf16"].startswith("train.precision: bf16")
    assert lost["the launcher's --fsdp_version 2"] == "parallel: {strategy: fsdp2}"
    assert "the file is not read" in lost["the launcher's --config_file a.yaml"]
    assert dict(found.idle)["the launcher's --main_process_port 1"].startswith("how processes start")
    assert not any("num_processes" in name for name in (*lost, *dict(found.idle)))


def test_a_range_of_machines_is_refused():
    with pytest.raises(PosttrainError, match="--nnodes 1:4 is a range"):
        translate(
            "hy-soar",
            ["torchrun", "--nnodes=1:4", "--nproc_per_node=8", "-m", "sora.train_soar_sd3_5m", *SHORT],
        )


rate = st.floats(1e-12, 10, allow_nan=False)


@given(rate, st.integers(1, 64), st.integers(1, 8), st.integers(1, 16), st.integers(1, 10**6), rate)
def test_numbers_survive(learning_rate, each, accumulated, processes, steps, scale):
    words = [*SHORT, "--learning_rate", repr(learning_rate), f"--train_batch_size={each}", "--lambda_aux", repr(scale),
             f"--gradient_accumulation_steps={accumulated}", f"--max_train_steps={steps}"]  # fmt: skip
    (stage,) = recipe_of("hy-soar", words, processes).stages
    assert stage.train.learning_rate == learning_rate
    assert stage.train.batch_size == each * accumulated * processes
    assert (stage.train.steps, stage.algorithm.lambda_aux) == (steps, scale)


plain = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
)  # fmt: skip


@given(
    st.recursive(
        plain,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.-_ :#", min_size=1), inner, max_size=3)
        ),
    )
)
def test_a_value_is_written_as_yaml_that_reads_alike(value):
    read = parse(f"value: {text_of(value)}", "text").data["value"]
    assert same(read, value)


ODD = st.one_of(
    st.sampled_from([0, -1, 1, 2, 0.5, 1e308, True, False, "", "x", "none", "1", ": #", None]),
    st.lists(st.sampled_from([0, -5, 5, "a", None, {}, 0.1]), max_size=2),
    st.dictionaries(st.sampled_from(["a", "reward_model", "dataset_dir", "train", "learning_rate", "betas"]),
                    st.sampled_from([1, "x", None, []]), max_size=2),
).flatmap(lambda value: st.sampled_from([value, [value]]))  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
@settings(max_examples=40)
@given(data=st.data())
def test_no_value_of_a_flag_ends_in_a_traceback(trainer, data):
    known = TRAINERS[trainer]
    values = Settings(known.title, known.prefix, known.table)
    names = data.draw(st.sampled_from(VARIANTS.get(trainer, [{}])))
    pairs = [
        (name.removeprefix("config."), value)
        for name, value in parsed(filled(STARTS[trainer], names), known.scripts).flags
    ]
    if known.published:
        pairs = [*known.published[pairs[0][1].partition(":")[2]][1].items()]
    pairs += data.draw(st.lists(st.tuples(st.sampled_from(sorted(known.table)), ODD), min_size=1, max_size=3))
    draft = Draft(values)
    with contextlib.suppress(PosttrainError):
        for name, value in pairs:
            values.give(name, value)
        known.build(values, draft, Start(processes=data.draw(st.sampled_from([1, 3, 8]))))
        parse_recipe(draft.yaml("odd"), "recipe", checks=False)


def same(read, value):
    if isinstance(value, float) and not isinstance(value, bool):
        return isinstance(read, float | int) and math.isclose(read, value, rel_tol=1e-15)
    if isinstance(value, list):
        return len(read) == len(value) and all(map(same, read, value))
    if isinstance(value, dict):
        return list(read) == list(value) and all(same(read[k], value[k]) for k in value)
    return type(read) is type(value) and read == value


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_page_of_a_trainer_names_flags_that_it_has(trainer):
    page = re.sub(r"^```.*?^```", "", (ROOT / "docs" / f"from-{trainer}.md").read_text(), flags=re.M | re.S)
    heading = {"hy-soar": "Flags", "simpletuner": "Options"}.get(trainer, "Settings")
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", page, re.M | re.S)
    table = TRAINERS[trainer].table
    rows = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `")]
    named = {flag.lstrip("-") for row in rows for flag in re.findall(r"`([^`]+)`", row)}
    assert named
    assert named <= set(table), named - set(table)
    told_of = {word.lstrip("-").removeprefix("config.") for word in re.findall(r"`([^`]+)`", page)}
    assert {name for name, flag in table.items() if flag.translated} - told_of == set()


def test_conflicting_numbers_of_processes_are_refused():
    with pytest.raises(PosttrainError, match="--processes 4, but its launcher starts 8"):
        translate("hy-soar", SOAR, 4)
    assert translate("hy-soar", SOAR, 8).text


def test_a_bare_flag_is_for_switches_alone():
    with pytest.raises(PosttrainError, match="--seed needs a value"):
        translate("hy-soar", [*SHORT, "--seed"], 1)
    assert BARE is not True


def test_the_command(tmp_path):
    words = ("import-flags", "diffusion-nft", "config/nft.py:sd3_multi_reward", "--output", "nft.yaml")
    done = posttrain(*words, "--", "--config.beta=0.5", cwd=tmp_path)
    assert done.stdout == ""
    for told_of in (
        "DiffusionNFT: ",
        "not needed:",
        "behaves differently:",
        "missing here",
        "wrote nft.yaml; next: posttrain check",
    ):
        assert told_of in done.stderr
    assert load_recipe(tmp_path / "nft.yaml", checks=False).stages[0].algorithm.beta == 0.5
    refused = posttrain("check", "nft.yaml", cwd=tmp_path, code=1).stderr
    assert "no file 'dataset/pickscore/train.txt'" in refused
    assert "exists" in posttrain(*words, cwd=tmp_path, code=1).stderr
    (tmp_path / "dataset" / "pickscore").mkdir(parents=True)
    for name in ("train", "test"):
        (tmp_path / "dataset" / "pickscore" / f"{name}.txt").write_text("a cat\na dog\n")
    assert (
        "no file"
        not in posttrain(
            "import-flags", "diffusion-nft", "config/nft.py:sd3_multi_reward", cwd=tmp_path
        ).stderr
    )


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
    algorithm = parse_recipe(found.text, "recipe", checks=False).stages[0].algorithm
    for flag, value in zip(words.split()[::2], words.split()[1::2], strict=True):
        if flag not in idle:
            assert str(getattr(algorithm, flag[2:])) in (value, f"{value}.0")
