"""SimpleTuner's config.json, config.env and data sets become recipes."""

import json
import re

import pytest
from imported import recipe_of, stage_of, told

from posttrain.errors import PosttrainError
from posttrain.importing.trainers import translate
from posttrain.recipe.file import parse_recipe

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


def test_a_variable_of_words_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "config.env").write_text('TRAINER_EXTRA_ARGS="--a=\'6"\n')
    with pytest.raises(PosttrainError, match=r"TRAINER_EXTRA_ARGS of config\.env cannot be read"):
        translate("simpletuner", [str(tmp_path / "config.env")])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which SimpleTuner's commands find their configurations."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config" / "foo").mkdir(parents=True)
    options = {"--model_family": "sd3", "model_type": "lora", "--max_train_steps": 10, "num_processes": 2}
    (tmp_path / "config" / "foo" / "config.json").write_text(json.dumps({**options, "num_machines": 2}))
    (tmp_path / "config" / "config.env").write_text(
        "MODEL_FAMILY=sd3\nMAX_NUM_STEPS=7\nCUDA_VISIBLE_DEVICES=1\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "simpletuner train env=foo", "simpletuner train --env foo", "/opt/bin/simpletuner train --env=foo",
        "simpletuner train --config config/foo/config.json", "simpletuner-train env=foo", "ENV=foo bash train.sh",
        "python -m simpletuner train env=foo", "config/foo/config.json simpletuner train",
        "accelerate launch --num_processes=2 train.py --env foo",
    ],
)  # fmt: skip
def test_commands_name_their_configuration(folder, command):
    train = recipe_of("simpletuner", [*command.split(), "--gradient_accumulation_steps=3"]).stages[0].train
    assert (train.steps, train.batch_size) == (10, 4 * 3 * 2)  # num_processes counts those of all machines


def test_the_installed_command_takes_words_without_dashes_and_a_file_of_the_folder(folder):
    recipe = recipe_of("simpletuner", ["simpletuner", "train", "seed=5", "--lora_rank=4"])
    (stage,) = recipe.stages
    assert (recipe.seed, stage.train.steps, stage.tune.rank, stage.train.batch_size) == (5, 7, 4, 4)


def test_a_script_starts_the_installed_command(folder):
    (folder / "run.sh").write_text(
        "LR=1e-5\nexport HF_HOME=/tmp TRAINING_NUM_PROCESSES=4\n"
        "simpletuner train env=foo --learning_rate=$LR 2>&1 | tee log\n"
    )
    train = recipe_of("simpletuner", ["run.sh"]).stages[0].train
    assert (train.learning_rate, train.batch_size) == (1e-5, 16)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("simpletuner train example=bar", "simpletuner examples copy bar"),
        ("simpletuner train env=nope", "config/nope/config.json or .*no such file"),
        ("simpletuner train --config a.toml", "no such file"),
        ("config/foo/config.json simpletuner train env=foo", "give .* or env of the command, not both"),
        ("simpletuner train env=foo stray", "'stray' is neither a flag nor the value of one"),
        ("config/foo/config.json accelerate launch --num_processes 4 train.py",
         "the launcher starts 4 processes, but num_processes is 2"),
    ],
)  # fmt: skip
def test_commands_that_leave_their_configuration_open(folder, command, words):
    with pytest.raises(PosttrainError, match=words):
        translate("simpletuner", command.split())


def test_learning_rate_and_weight_decay_from_other_options(folder):
    more = [
        "--lr_scale",
        "--lr_scale_sqrt",
        "--learning_rate=1",
        "--optimizer_config=weight_decay=0.5",
        "--seed=-1",
    ]
    found = translate("simpletuner", ["config/foo/config.json", *more])
    train = stage_of(found).train
    assert (train.learning_rate, train.weight_decay) == (pytest.approx(8**0.5), 0.5)
    assert told(found.idle, "--seed") == ["it is no seed; the recipe has one of its own"]


def test_a_switch_may_stand_bare_and_a_data_set_has_sizes_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    block = {"instance_data_dir": "/x", "resolution": 512, "resolution_type": "pixel"}
    (tmp_path / "data.json").write_text(json.dumps([block]))
    words = "--model_family=sd3 --max_train_steps=10 --lr_scheduler=constant --data_backend_config=data.json"
    found = translate("simpletuner", [*words.split(), "--resolution=768", "--push_to_hub", "--controlnet"])
    assert told(found.lost, "--controlnet") == ["it has no counterpart"]
    assert told(found.idle, "--resolution") == ["the data set has its own"]
    lost = dict(found.lost)
    assert lost["--data_backend_config: resolution_type pixel"].startswith(
        "resolution is the area of a bucket"
    )
