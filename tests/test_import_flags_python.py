"""A Python configuration is read and not run; what it may not have is told with its line."""

import pytest
from imported import recipe_of, told

from posttrain.errors import PosttrainError
from posttrain.importing.trainers import translate
from posttrain.recipe.file import parse_recipe

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


def test_what_is_lost_of_ones_own_base_is_told(tmp_path):
    (tmp_path / "grpo.py").write_text(OWN)
    base = BASE.replace(
        "config.train.learning_rate", "config.train.sft = 0.5\n    config.train.learning_rate"
    )
    (tmp_path / "base.py").write_text(base)
    found = translate("flow-grpo", [f"{tmp_path / 'grpo.py'}:mine"])
    assert told(found.lost, "config.train.sft") == ["a stage of type sft before this one"]


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


def test_a_file_that_is_too_deep_and_a_name_that_is_missing_are_told(tmp_path):
    (tmp_path / "deep.py").write_text(f"x = {'(' * 300}1{')' * 300}\n")
    with pytest.raises(PosttrainError, match=r"deep\.py is not valid Python"):
        translate("flow-grpo", [f"{tmp_path}/deep.py:mine"], 1)
    with pytest.raises(PosttrainError, match="--config needs a value"):
        translate("flow-grpo", ["--config"])
