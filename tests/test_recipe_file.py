"""Tests that faulty recipes are refused with line, field, value and remedy."""

import json

import pytest
from faulty_recipes import OVERRIDES, WRITTEN
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import pipeline_folder
from ruamel.yaml import YAML
from ruamel.yaml.parser import Parser

from posttrain.errors import RecipeError
from posttrain.recipe.file import dump_recipe, load_recipe, parse_recipe, recipe_text, shipped_recipes

GOOD = f"""\
name: good
seed: 3
model: {{type: sd3, path: {pipeline_folder()}, max_sequence_length: 16}}
stages:
  - name: sft
    algorithm: {{type: sft}}
    data:
      type: shapes
      images: 20
    train:
      steps: 100
      batch_size: 8
      learning_rate: 3e-4
      weight_decay: 1e-4
  - name: soar
    start_from: sft
    algorithm:
      type: soar
      lambda_aux: 1.0
      sde_rollout_type: flow_sde
    data: {{type: shapes, images: 20}}
    tune: {{type: lora, rank: 4}}
    train: {{steps: 100, precision: bf16}}
evaluation:
  prompts: {{type: shapes, count: 6}}
  rewards: [shapes]
  resolution: 64
"""


def swap(old, new):
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


# (what is wrong, the text, line, words that the message must have)
FAULTS = [
    ("1 misspelt key", swap("batch_size", "batchsize"), 12, ["stages.0.train.batchsize", "did you mean 'batch_size'"]),
    ("2 misspelt section", swap("evaluation:", "evalution:"), 24, ["evalution", "did you mean 'evaluation'"]),
    ("3 word for a number", swap("learning_rate: 3e-4", "learning_rate: fast"), 13, ["learning_rate", "a number", "'fast'"]),
    ("5 misspelt enum", swap("sde_rollout_type: flow_sde", "sde_rollout_type: flow_sd"), 20, ["'flow_sd'", "did you mean 'flow_sde'", "cps"]),
    ("6 misspelt tuning", swap("type: lora", "type: lorra"), 22, ["tune", "'lorra'", "did you mean 'lora'", "full"]),
    ("7 unknown model", swap("type: sd3", "type: sdxl3"), 3, ["model", "'sdxl3'", "sd3"]),
    ("9 wrong case", swap("sde_rollout_type: flow_sde", "sde_rollout_type: Flow-SDE"), 20, ["'Flow-SDE'", "did you mean 'flow_sde'"]),
    ("11 misspelt algorithm", swap("type: soar", "type: sora"), 18, ["stages.1.algorithm.type", "'sora'", "did you mean 'soar'"]),
    ("13 negative count", swap("rank: 4", "rank: -4"), 22, ["tune.rank", "greater than or equal to 1", "-4"]),
    ("17 misspelt dtype", swap("path:", "dtype: bf61, path:"), 3, ["model.dtype", "'bf61'", "did you mean 'bf16'"]),
    ("18 misspelt precision", swap("precision: bf16", "precision: fp8"), 23, ["precision", "'fp8'", "fp32, bf16"]),
    ("19 no such device", swap("seed: 3", "device: gpu"), 2, ["device", "'gpu'", "'cuda'"]),
    ("19 a device in the wrong case", swap("seed: 3", "device: CUDA"), 2, ["device", "'CUDA'", "did you mean 'cuda'"]),
    ("no type", swap("algorithm: {type: sft}", "algorithm: {cond_dropout: 0.1}"), 6, ["stages.0.algorithm", "no 'type'", "flow_grpo, reflexflow, sft, soar"]),
    ("a folder that the hub could not have", GOOD.replace(str(pipeline_folder()), "models/"), 3, ["model.path", "does not exist"]),
    ("19 a GPU that is not there", swap("seed: 3", "device: cuda:99"), 2, ["device", "'cuda:99'", "CUDA devices"]),
    ("20 a list where a mapping belongs", swap("{steps: 100, precision: bf16}", "[100]"), 23, ["train", "a block of fields", "a list of 1"]),
    ("21 misspelt reward", swap("[shapes]", "[shappes]"), 26, ["rewards", "'shappes'", "did you mean 'shapes'"]),
    ("22 a reward twice", swap("[shapes]", "[shapes, shapes]"), 26, ["shapes is given twice"]),
    ("22 a stage twice", swap("name: soar", "name: sft"), 15, ["stages.1.name", "two stages are called 'sft'"]),
    ("22 a key twice", swap("seed: 3", "seed: 3\nseed: 4"), 3, ["'seed' is given twice", "line 2"]),
    ("24 no model", GOOD.replace(GOOD.splitlines()[2] + "\n", ""), 1, ["model", "missing"]),
    ("25 an empty section", swap("{steps: 100, precision: bf16}", ""), 23, ["stages.1.train", "is empty"]),
    ("26 no data file", swap("data: {type: shapes, images: 20}", "data: {images: nowhere.jsonl}"), 21, ["data.images", "no file 'nowhere.jsonl'"]),
    ("26 no prompts file", swap("{type: shapes, count: 6}", "nowhere.txt"), 25, ["evaluation.prompts", "no file 'nowhere.txt'"]),
    ("27 unknown tracker", swap("seed: 3", "tracker: tensorbord"), 2, ["tracker", "'tensorbord'", "did you mean 'tensorboard'"]),
    ("28 no path to start from", swap("start_from: sft", "start_from: ./nowhere"), 16, ["start_from", "no folder 'nowhere'"]),
    ("29 batch size 0", swap("batch_size: 8", "batch_size: 0"), 12, ["batch_size", "greater than or equal to 1", "0"]),
    ("30 a count as a word", swap("count: 6", "count: six"), 25, ["count", "a whole number", "'six'"]),
    ("31 a number in quotes", swap("steps: 100\n", "steps: '100'\n"), 11, ["steps", "'100' in quotes", "remove the quotes"]),
    ("a truth value for a number", swap("batch_size: 8", "batch_size: true"), 12, ["batch_size", "truth value true"]),
    ("a fraction for a count", swap("batch_size: 8", "batch_size: 8.5"), 12, ["batch_size", "a whole number", "8.5"]),
    ("a stage from itself", swap("start_from: sft", "start_from: soar"), 16, ["stages.1.start_from", "starts from 'soar'", "itself", "'sft'"]),
    ("a stage from a later one", swap("    algorithm: {type: sft}", "    start_from: soar\n    algorithm: {type: sft}"), 6, ["stages.0.start_from", "starts from 'soar'", "does not come before"]),
    ("two folders that differ in case", swap("name: soar", "name: SFT"), 15, ["'SFT' and 'sft'"]),
    ("a warm-up longer than the run", swap("batch_size: 8", "warmup_steps: 100"), 10, ["warmup_steps 100 must be less than steps 100"]),
    ("a resolution that does not divide", swap("resolution: 64", "resolution: 66"), 27, ["66", "4 pixels", "64 or 68"]),
    ("LoRA rank 0", swap("rank: 4", "rank: 0"), 22, ["rank", "greater than or equal to 1"]),
    ("LoRA targets that match nothing", swap("rank: 4", "targets: [attn.to_qq]"), 22, ["targets", "nothing would be trained", "attn.to_qq"]),
    ("steps 0", swap("steps: 100\n", "steps: 0\n"), 11, ["steps", "greater than or equal to 1"]),
    ("a weight of NaN", swap("lambda_aux: 1.0", "lambda_aux: .nan"), 19, ["lambda_aux", "finite number", "nan"]),
    ("an infinite number", swap("lambda_aux: 1.0", "lambda_aux: .inf"), 19, ["lambda_aux", "finite number", "inf"]),
    ("an evaluation without prompts", swap("  prompts: {type: shapes, count: 6}\n", ""), 24, ["evaluation.prompts", "missing"]),
    ("a weight that would do nothing", swap("[shapes]", "{shapes: 2.0}"), 24, ["weight of shapes would have no effect"]),
    ("a reserved name", swap("name: soar", "name: base"), 15, ["cannot be called 'base'"]),
    ("a name that is a path", swap("name: soar", "name: ../soar"), 15, ["stages.1.name", "'../soar'"]),
    ("a missing model folder", GOOD.replace(str(pipeline_folder()), "./nowhere"), 3, ["model.path", "does not exist"]),
    ("a tab", swap("  - name: sft", "\t- name: sft"), 5, ["tab"]),
    ("a list as a recipe", "- a\n- b\n", 1, ["a list"]),
    ("an empty file", "", None, ["empty"]),
    ("only a comment", "# nothing\n", None, ["empty"]),
    ("a tag that would run code", swap("seed: 3", "seed: !!python/object/apply:os.getpid []"), 2, ["tag", "not allowed"]),
    ("two documents", GOOD + "---\na: 1\n", 29, ["second document"]),
    ("unbalanced brackets", swap("[shapes]", "[shapes"), 27, ["not valid YAML"]),
    ("an alias that contains itself", swap("seed: 3", "seed: &a [*a]"), 2, ["alias"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "words"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_faulty_recipe_is_refused_by_line_and_remedy(text, line, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert message.startswith(f"r.yaml:{line}: " if line else "r.yaml: "), message
    for word in words:
        assert word in message


START = Parser.parse_stream_start


def test_the_good_recipe_is_good_and_its_numbers_are_numbers():
    recipe = parse_recipe(GOOD, "r.yaml")
    assert recipe.stages[0].train.learning_rate == 3e-4
    assert recipe.stages[0].train.weight_decay == 1e-4
    assert recipe.stages[1].train.precision == "bf16"


@pytest.mark.parametrize(
    "form", ["shapes", "[shapes]", "{shapes: }", "{shapes: {score: strict}}", "[{type: shapes}]"]
)
def test_rewards_may_be_given_in_short_forms(form):
    (reward,) = parse_recipe(swap("[shapes]", form), "r.yaml").evaluation.rewards
    assert reward.type == "shapes"
    assert reward.score == ("strict" if "strict" in form else "graded")


def test_all_problems_are_told_at_once_in_the_order_of_the_lines():
    text = swap("batch_size: 8", "batch_size: 0").replace("rank: 4", "rank: x").replace("seed: 3", "sed: 3")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "12", "22"]


def test_a_resolved_recipe_loads_again_to_an_equal_one():
    recipe = parse_recipe(GOOD, "r.yaml")
    assert parse_recipe(dump_recipe(recipe), "resolved.yaml") == recipe


def test_overrides_reach_stages_by_name_and_by_number():
    overrides = [
        "stages.soar.train.steps=7",
        "stages.0.train.learning_rate=1e-5",
        "evaluation.guidance=2",
        "seed=9",
    ]
    recipe = parse_recipe(GOOD, "r.yaml", overrides)
    assert recipe.stages[1].train.steps == 7
    assert recipe.stages[0].train.learning_rate == 1e-5
    assert (recipe.evaluation.guidance, recipe.seed) == (2.0, 9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.sor.train.steps=1", "no item 'sor' in stages (did you mean 'soar'?)"),
        ("stages.\u00b2.train.steps=1", "no item '\u00b2' in stages"),
        ("stages.soar.train.stepps=1", "--set stages.soar.train.stepps=1: stages.1.train.stepps"),
        ("stages.soar.train.steps=x", "--set stages.soar.train.steps=x: stages.1.train.steps"),
        ("steps", "give a field and its value"),
        ("name.a=1", "has no fields"),
        ("seed=[", "not valid YAML"),
    ],
)
def test_a_faulty_override_is_named(override, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD, "r.yaml", [override])
    assert words in str(caught.value)


def test_files_that_are_no_recipes_are_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "big.yaml").write_text("a: " + "x" * 1_100_000)
    (tmp_path / "bomb.yaml").write_text(
        "a: &a [x, x]\n"
        + "".join(
            f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghijk", "bcdefghijkl", strict=True)
        )
    )
    for name, words in [
        ("binary.yaml", "not a text file"),
        ("big.yaml", "at most 1,000,000"),
        ("bomb.yaml", "aliases expand"),
        ("absent.yaml", "No such file"),
        ("", "is a folder"),
    ]:
        with pytest.raises(RecipeError, match=words):
            load_recipe(tmp_path / name)


def test_a_text_is_parsed_once_and_its_first_fault_is_told(monkeypatch):
    made = []
    monkeypatch.setattr(Parser, "parse_stream_start", lambda self: made.append(self) or START(self))
    parse_recipe(GOOD, "r.yaml")
    assert len(made) == 1
    with pytest.raises(RecipeError, match=r"^r\.yaml:1: not valid YAML: found undefined alias"):
        parse_recipe("a: *x\nb: !t 1\n", "r.yaml")


def test_an_unknown_name_lists_the_shipped_recipes():
    with pytest.raises(RecipeError, match=r"no recipe 'quikstart'.*did you mean 'quickstart'.*sd35m-soar"):
        load_recipe("quikstart")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid_and_described(name):
    recipe = parse_recipe(recipe_text(name), f"{name}.yaml", checks=False)
    assert recipe.name == name
    said = shipped_recipes()[name]
    assert len(said) > 20
    assert said.endswith("."), "the first line stands alone in the list"
    assert parse_recipe(dump_recipe(recipe), "resolved", checks=False) == recipe


def test_the_soar_recipe_is_the_published_run():
    recipe = parse_recipe(recipe_text("sd35m-soar"), "sd35m-soar.yaml", checks=False)
    (stage,) = recipe.stages
    soar, train = stage.algorithm, stage.train
    assert (soar.lambda_aux, soar.num_rollout_paths, soar.trajectory_length) == (1.0, 1, 6)
    assert (soar.num_sampling_steps, soar.cfg_scale_sampling, soar.weighting_scheme) == (
        40,
        4.5,
        "logit_normal",
    )
    assert (train.batch_size, train.steps, train.learning_rate, train.weight_decay) == (32, 5000, 2e-5, 1e-2)
    assert (train.max_grad_norm, train.precision, train.schedule) == (1.0, "bf16", "constant")
    assert (train.compile, train.gradient_checkpointing, train.micro_batch) == ("auto", "auto", "auto")
    assert stage.data.resolution == 512
    assert stage.tune.type == "full"


PLAIN = YAML(typ="safe", pure=True).load(GOOD)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=4), st.just([]), st.just({})
)


def paths(data, at=()):
    for key, value in (
        data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    ):
        yield (*at, key)
        yield from paths(value, (*at, key))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_mutation_of_a_recipe_raises_anything_but_a_recipe_error(data):
    import copy
    import io

    recipe = copy.deepcopy(PLAIN)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(list(paths(recipe))))
        block = recipe
        for part in path:
            block = block[part]
        if data.draw(st.booleans()) and isinstance(block, dict):
            block[data.draw(st.text(max_size=5))] = block.pop(last)
        else:
            block[last] = data.draw(SCALARS)
    text = io.StringIO()
    YAML().dump(recipe, text)
    try:
        parse_recipe(text.getvalue(), "r.yaml")
    except RecipeError as error:
        assert str(error).startswith("r.yaml")  # noqa: PT017 (most mutations raise nothing)


@pytest.mark.parametrize(("text", "line", "words"), [w[1:] for w in WRITTEN], ids=[w[0] for w in WRITTEN])
def test_what_is_no_plain_yaml_is_refused_by_line(text, line, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    message = str(caught.value)
    assert message.startswith(f"r.yaml:{line}: " if line else "r.yaml: "), message
    assert len(message) < 200
    for word in words:
        assert word in message


@pytest.mark.parametrize(("overrides", "start", "words"), OVERRIDES)
def test_a_problem_that_an_override_made_names_it(overrides, start, words):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD, "r.yaml", overrides)
    message = str(caught.value)
    assert message.startswith(start), message
    assert "r.yaml" not in message
    for word in words:
        assert word in message


def test_an_evaluation_that_an_override_begins_is_the_overrides_to_complete():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(GOOD.split("evaluation:")[0], "r.yaml", ["evaluation.steps=3"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("--set evaluation.steps=3: evaluation.") for line in lines)


def test_an_evaluation_left_empty_is_refused_and_null_means_none():
    begun = GOOD.split("evaluation:")[0]
    with pytest.raises(RecipeError, match=r"^r\.yaml:24: evaluation: is empty"):
        parse_recipe(begun + "evaluation:\n", "r.yaml")
    recipe = parse_recipe(begun + "evaluation: null\n", "r.yaml")
    assert recipe.evaluation is None
    assert parse_recipe(dump_recipe(recipe), "resolved.yaml") == recipe
    assert parse_recipe(GOOD, "r.yaml", ["evaluation=null"]) == recipe


@pytest.mark.parametrize(
    "name", ["1e5", "123", "yes", "null", "true", "0x10", "2020-01-01", "017", "1_000", "inf"]
)
def test_a_name_that_looks_like_something_else_survives_the_round_trip(name):
    recipe = parse_recipe(swap("name: good", f"name: '{name}'"), "r.yaml")
    assert recipe.name == name
    assert parse_recipe(dump_recipe(recipe), "resolved.yaml") == recipe


def test_nothing_of_a_tag_is_executed(tmp_path):
    made = tmp_path / "made"
    text = swap("seed: 3", f"seed: !!python/object/apply:os.mkdir ['{made}']")
    with pytest.raises(RecipeError):
        parse_recipe(text, "r.yaml")
    assert not made.exists()


def test_an_anchor_may_be_used_twice_without_a_warning(recwarn):
    text = swap("seed: 3", "seed: &a 3").replace("rank: 4", "rank: &a 4")
    assert parse_recipe(text, "r.yaml").stages[1].tune.rank == 4
    assert not [w for w in recwarn if "anchor" in str(w.message)]


def test_a_reward_block_says_which_reward_it_is():
    with pytest.raises(RecipeError, match=r"^r\.yaml:26: evaluation\.rewards: item 0 .* give it a 'type'"):
        parse_recipe(swap("[shapes]", "[{score: strict}]"), "r.yaml")


def test_paths_that_no_file_can_have_are_refused(tmp_path):
    for source in ("x" * 300, "./" + "x" * 300, "./a\0b", ""):
        with pytest.raises(RecipeError):
            load_recipe(source)
    with pytest.raises(RecipeError, match="more than 1,000,000 bytes"):
        load_recipe("/dev/zero")


def test_a_folder_does_not_hide_the_shipped_recipe_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "sd35m-soar").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^sd35m-soar\.yaml:\d+: .*no file 'data/train\.jsonl'"):
        load_recipe("sd35m-soar")


def test_a_transformer_in_several_files_can_be_started_from(tmp_path):
    (tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"")
    recipe = parse_recipe(swap("start_from: sft", f"start_from: {tmp_path}"), "r.yaml")
    assert recipe.stages[1].start_from == str(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model_index.json", b"{", "is damaged: "),
        ("model_index.json", b"[]", "no JSON object"),
        ("model_index.json", b"[" * 100_000, "is damaged: maximum recursion"),
        ("vae/config.json", b"{", "is damaged: "),
        ("transformer/x.safetensors", b"", "no safetensors file"),
        ("transformer/x.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("transformer/x.safetensors", b"\x02" + bytes(7) + b"{", "only a part"),
    ],
)
def test_a_model_that_cannot_be_read_is_a_problem_of_the_recipe(tmp_path, file, content, words):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    index = {"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderKL"]}
    index["transformer"] = ["diffusers", "SD3Transformer2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(RecipeError, match=rf"^r\.yaml:3: model\.path: .*{words}"):
        parse_recipe(GOOD.replace(str(pipeline_folder()), str(tmp_path)), "r.yaml")
