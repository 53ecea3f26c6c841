"""Configurations of flow_grpo and DiffusionNFT become the shipped recipes."""

import pytest
from imported import recipe_of

from posttrain.errors import PosttrainError
from posttrain.importing.trainers import TRAINERS, translate
from posttrain.recipe.file import load_recipe


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


def test_diffusion_nfts_micro_batch_makes_optimizer_steps():
    config = "config/nft.py:sd3_geneval"
    train = recipe_of("diffusion-nft", [config, "--config.train.batch_size=3"]).stages[0].train
    assert (train.batch_size, train.steps_per_batch) == (1152, 3)
    more = ["--config.train.batch_size=3", "--config.train.gradient_accumulation_steps=48"]
    assert recipe_of("diffusion-nft", [config, *more]).stages[0].train.steps_per_batch == 1
    with pytest.raises(PosttrainError, match="must divide a process's 144 samples"):
        translate("diffusion-nft", [config, "--config.train.batch_size=5"])
