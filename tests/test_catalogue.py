"""The lists of algorithms, models and types of data, the schema for editors, and the versions."""

import json
import re
from importlib.metadata import version

import pytest
from forked import posttrain

from posttrain import __version__
from posttrain.algorithm import Algorithm
from posttrain.data.family import Data
from posttrain.model import Model
from posttrain.recipe.catalogue import algorithms, data, models
from posttrain.recipe.json_schema import json_schema
from posttrain.recipe.schema import Recipe, Stage


def test_every_algorithm_model_and_type_of_data_is_listed_with_what_it_is():
    assert [entry.name for entry in algorithms()] == sorted(Algorithm.variants)
    assert [entry.name for entry in models()] == sorted(Model.variants)
    assert [entry.name for entry in data()] == sorted(Data.variants)
    for entry in (*algorithms(), *models(), *data()):
        assert "`" not in entry.summary
        assert re.fullmatch(r"[A-Z].{10,110}\.", entry.summary), entry
        assert entry.package == "posttrain"
    assert [entry.needs for entry in data() if entry.name == "shapes_pairs"] == ["gives pairs"]
    by_name = {entry.name: entry for entry in (*algorithms(), *models())}
    assert by_name["sft"].papers == ("arXiv:2210.02747",)
    assert by_name["sft"].needs == "needs images"
    assert by_name["diffusion_nft"].papers[0] == "arXiv:2509.16117"
    assert by_name["sdxl"].needs == "evaluation only; loads StableDiffusionXLPipeline"
    assert by_name["sd3"].needs == "training and evaluation; loads StableDiffusion3Pipeline"


def test_the_commands_list_them(tmp_path):
    lines = posttrain("algorithms", cwd=tmp_path).stdout.splitlines()
    assert lines[0].startswith("awm            Make good samples likelier")
    assert lines[1].startswith("               needs ")
    assert lines[1].endswith("; from posttrain")
    read = json.loads(posttrain("models", "--json", cwd=tmp_path).stdout)
    assert {row["name"] for row in read} == set(Model.variants)
    read = json.loads(posttrain("data", "--json", cwd=tmp_path).stdout)
    assert {row["name"] for row in read} == set(Data.variants)


def test_the_versions_are_printed(tmp_path):
    line = posttrain("--version", cwd=tmp_path).stdout
    assert line.startswith(f"posttrain {__version__} (python 3.")
    for package in ("torch", "diffusers"):
        assert f"{package} {version(package)}" in line


@pytest.fixture(scope="module")
def schema():
    return json_schema()


def fits(value, schema, defs):
    """Whether ``value`` fits the part of JSON Schema that the schema uses."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return fits(value, {**defs[name], **{k: v for k, v in schema.items() if k != "$ref"}}, defs)
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int, "number": (int, float),
    }  # fmt: skip
    if (kind := schema.get("type")) and not isinstance(value, kinds[kind]):
        return False
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "not" in schema and fits(value, schema["not"], defs):
        return False
    if "anyOf" in schema and not any(fits(value, part, defs) for part in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(value, part, defs) for part in schema["oneOf"]) != 1:
        return False
    if isinstance(value, list) and "items" in schema:
        return all(fits(item, schema["items"], defs) for item in value)
    if isinstance(value, dict):
        fields, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        if set(schema.get("required", ())) - set(value) or (other is False and set(value) - set(fields)):
            return False
        parts = {name: fields.get(name, other if isinstance(other, dict) else {}) for name in value}
        return all(fits(value[name], part, defs) for name, part in parts.items())
    return True


def loaded(text):
    from ruamel.yaml import YAML

    return json.loads(json.dumps(YAML(typ="safe", pure=True).load(text)))


def test_the_schema_takes_the_recipes_that_come_with_posttrain_and_their_full_form(schema):
    from posttrain.recipe.file import dump_recipe, parse_recipe, recipe_text, shipped_recipes

    for name in shipped_recipes():
        text = recipe_text(name)
        full = name in ("quickstart-rl", "sd35m-soar-then-nft", "tiny-pretrain")
        for form in [text, *([dump_recipe(parse_recipe(text, name, checks=False))] if full else [])]:
            assert fits(loaded(form), schema, schema["$defs"]), name


@pytest.mark.parametrize(
    ("rewards", "good"),
    [
        ("shapes", True), (["shapes", "mine:f"], True), ({"shapes": 1.0, "mine:f": None}, True), ([{"type": "shapes"}], True),
        ({"type": "shapes", "score": "strict"}, True), ({"shapes": {"weight": 2}}, True), (3, False), ([3], False),
        ([{"type": "nothing"}], False), ({"shapes": "x"}, False), ([{"type": "mine:Taste", "gain": 2}], True),
    ],
)  # fmt: skip
def test_the_schema_knows_the_short_forms_of_rewards(schema, rewards, good):
    field = schema["$defs"]["Stage"]["properties"]["rewards"]
    assert fits(rewards, field, schema["$defs"]) is good
    assert field["description"] == Stage.model_fields["rewards"].description
    assert fits(rewards, schema["$defs"]["Evaluation"]["properties"]["rewards"], schema["$defs"]) is good


@pytest.mark.parametrize("field", ["model", "algorithm", "data"])
def test_the_schema_takes_a_class_of_the_users_own(schema, field):
    part = (schema if field == "model" else schema["$defs"]["Stage"])["properties"][field]
    assert fits({"type": "mine:Own", "scale": 2}, part, schema["$defs"])
    for wrong in ("mine", ":Own", "mine:", "a:b:c"):
        assert not fits({"type": wrong, "scale": 2}, part, schema["$defs"]), wrong


def test_the_schema_refuses_what_a_recipe_may_not_have_and_describes_every_field(schema):
    from posttrain.recipe.file import recipe_text

    for change in ("steps: 150", "type: sft}", "seed: 0", "guidance: 2.0"):
        name, _, value = change.partition(": ")
        text = recipe_text("quickstart").replace(change, f"{name}: [x]{'}' if '}' in value else ''}", 1)
        assert not fits(loaded(text), schema, schema["$defs"]), change
    text = recipe_text("quickstart").replace("seed: 0", "sead: 0")
    assert not fits(loaded(text), schema, schema["$defs"])
    for name, field in Recipe.model_fields.items():
        assert schema["properties"][name]["description"] == field.description
    monitor = schema["$defs"]["Monitor"]["properties"]
    assert fits(3, monitor["prompts"], {})
    assert not fits("p.txt", monitor["prompts"], {})
    assert fits("p.txt", schema["$defs"]["Evaluation"]["properties"]["prompts"], schema["$defs"])


def test_the_command_writes_the_schema_and_the_line_for_editors(tmp_path):
    done = posttrain("schema", "--output", "s.json", cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"# yaml-language-server: $schema={tmp_path / 's.json'}"
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(
        posttrain("schema", cwd=tmp_path).stdout
    )
