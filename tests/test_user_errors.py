"""A user's own class that fails is one error: its name, the method, the error, and his lines without ours."""

import io
import sys

import pytest
import torch
from rich.console import Console
from runs import DATA, EVALUATION, HEAD, stage

import posttrain
from posttrain.cli import ending
from posttrain.errors import DataError, RecipeError, RewardError, UserCodeError
from posttrain.model import FlowModel
from posttrain.recipe.file import parse_recipe
from posttrain.reward import checked
from posttrain.support.user_errors import as_user_error, told

OWN = """
from typing import ClassVar, Literal
import torch
from posttrain.algorithm import Algorithm, Items, Losses
from posttrain.data.family import Data, Facts
from posttrain.data.image_data import ImageFiles
from posttrain.errors import DataError
from posttrain.reward import Reward, Scores

def helper(rows):
    return rows[3]

class Files(ImageFiles):
    type: Literal["own_files"] = "own_files"

    def build(self, folder):
        return helper([])

    def facts(self, path):
        return Facts((16, 16), 1, 1)

class Base(Data):
    gives: ClassVar = "images"

    def facts(self, path):
        return Facts((16, 16), 1, 1)

class Open(Base):
    type: Literal["own_open"] = "own_open"

    def open(self, opening):
        return helper([])

class Minds(Base):
    type: Literal["own_minds"] = "own_minds"

    def open(self, opening):
        raise AssertionError("not in these tests")

    def problems(self):
        return helper([])

class Told(Base):
    type: Literal["own_told"] = "own_told"

    def open(self, opening):
        raise DataError("no flags today")

class Toy(Algorithm):
    needs: ClassVar = "images"

    def collect(self, batch, tools):
        fields = {"prompt_index": batch.prompt_index, "sample_index": batch.sample_index}
        return Items(torch.ones(len(batch)), fields, batch.conditions)

    def loss(self, items, policy):
        return Losses(torch.zeros(len(items)))

class Collects(Toy):
    type: Literal["own_collects"] = "own_collects"

    def collect(self, batch, tools):
        return helper([])

class Loses(Toy):
    type: Literal["own_loses"] = "own_loses"

    def loss(self, items, policy):
        return helper([])

class Rates(Reward):
    range: ClassVar = (0.0, 1.0)

class Bright(Rates):
    type: Literal["own_bright"] = "own_bright"
    power: float = 1.0

    def load(self, device):
        return lambda images, prompts, metadata: Scores(images.flatten(1).mean(1) ** self.power)

class Dark(Rates):
    type: Literal["own_dark"] = "own_dark"

    def load(self, device):
        return helper([])

class Dim(Rates):
    type: Literal["own_dim"] = "own_dim"

    def load(self, device):
        return lambda images, prompts, metadata: helper([])

def bright(images, prompts, metadata):
    return helper([])
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module ``own`` of the user's, in the current folder."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own", None)


def with_data(kind):
    return HEAD + "stages:\n" + stage("sft").replace(DATA, f"{{type: {kind}}}")


def with_algorithm(kind):
    return HEAD + "stages:\n" + stage("own", f"{{type: {kind}}}")


def with_reward(named):
    return HEAD + "stages:\n" + stage("sft") + EVALUATION.replace("rewards: shapes", f"rewards: {named}")


def run_by_command(text, monkeypatch, capsys, *options):
    """What the command prints as its error."""
    with open("r.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    command = ["posttrain", "run", "r.yaml", *options]
    monkeypatch.setattr(sys, "argv", command)
    from posttrain.cli.app import app

    with pytest.raises(SystemExit) as ended:
        ending.run_to_the_end(lambda: app(command[1:]))
    assert ended.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "hook"),
    [
        (with_data("own:Files"), "own:Files.build"),
        (with_data("own:Open"), "own:Open.open"),
        (with_data("own:Minds"), "own:Minds.problems"),
        (with_algorithm("own:Collects"), "own:Collects.collect"),
        (with_algorithm("own:Loses"), "own:Loses.loss"),
        (with_reward("own:Dark"), "own:Dark.load"),
    ],
)
def test_a_class_that_fails_is_one_error_with_its_lines_alone(own, monkeypatch, capsys, text, hook):
    printed = run_by_command(text, monkeypatch, capsys)
    head, *lines = printed[printed.index("error: ") :].splitlines()
    assert head == f"error: {hook} failed: IndexError: list index out of range"
    assert [line.split(", in ")[1] for line in lines if "File " in line] == [
        hook.rpartition(".")[2],
        "helper",
    ]
    assert all(str(own / "own.py") in line for line in lines if "File " in line)
    assert lines[-1].strip() == "return rows[3]"
    assert "Traceback" not in printed


def test_python_gets_the_same_error_with_its_cause(own):
    with pytest.raises(UserCodeError, match=r"^own:Files\.build failed: IndexError: list index") as caught:
        posttrain.run(
            parse_recipe(with_data("own:Files"), "r.yaml"), own / "run", Console(file=io.StringIO())
        )
    assert isinstance(caught.value.__cause__, IndexError)


def test_an_error_that_the_class_words_itself_is_told_as_it_is(own):
    with pytest.raises(DataError, match=r"^no flags today$"):
        posttrain.run(parse_recipe(with_data("own:Told"), "r.yaml"), own / "run", Console(file=io.StringIO()))


@pytest.mark.parametrize(("named", "label"), [("own:Dim", "own_dim"), ("own:bright", "bright")])
def test_a_reward_that_fails_shows_its_lines(own, named, label):
    made = parse_recipe(with_reward(named), "r.yaml")
    with pytest.raises(RewardError) as caught:
        posttrain.run(made, own / "run", Console(file=io.StringIO()))
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"reward {label!r} failed on prompts such as 'a photo of")
    assert head.endswith(": IndexError: list index out of range")
    assert [line.rpartition(" in ")[2] for line in lines if "File " in line][-1] == "helper"
    assert all(str(own / "own.py") in line for line in lines if "File " in line)


@pytest.mark.parametrize(
    "named", ["{'own:Bright': 1}", "{'own:Bright': {power: 2}}", "own:Bright", "['own:Bright']"]
)
def test_a_class_of_rewards_is_named_like_a_function(own, named):
    (reward,) = parse_recipe(with_reward(named), "r.yaml").evaluation.rewards
    assert type(reward).__qualname__ == "Bright"
    assert reward.power == (2 if "power" in named else 1)
    score = checked(reward.label, reward.load(torch.device("cpu")))
    assert score(torch.full((1, 3, 2, 2), 0.5), ["a"], [{}]).value.tolist() == [
        0.25 if "power" in named else 0.5
    ]


def test_a_class_that_is_imported_is_found_too(own):
    (own / "more.py").write_text("from own import Bright as Own, bright\n")
    (reward,) = parse_recipe(with_reward("{'more:Own': 1}"), "r.yaml").evaluation.rewards
    assert reward.type == "own_bright"
    (reward,) = parse_recipe(with_reward("{'more:bright': 1}"), "r.yaml").evaluation.rewards
    assert reward.type == "callable"


def test_check_refuses_a_class_as_a_function_and_a_class_that_is_no_reward(own):
    with pytest.raises(
        RecipeError, match=r"'own:Bright' is a class of rewards, no function: write rewards: "
    ):
        parse_recipe(with_reward("[{type: callable, function: 'own:Bright'}]"), "r.yaml")
    with pytest.raises(
        RecipeError, match=r"'own:Files' is no reward .*must be a subclass of Reward with a line"
    ):
        parse_recipe(with_reward("{'own:Files': 1}"), "r.yaml")


def test_a_module_that_fails_is_told_with_file_and_line(own):
    (own / "own.py").write_text("\n\n1 / 0\n")
    with pytest.raises(
        RecipeError, match=r"'own:X': ZeroDivisionError: division by zero \(.*own\.py, line 3\)$"
    ):
        parse_recipe(with_algorithm("own:X"), "r.yaml")


class Velocity(FlowModel):
    """A model of the user's own whose methods fail."""

    def __init__(self):
        pass

    def velocity(self, latents, sigma, condition):
        return condition["clip"]

    encode_prompts = posterior = latent_shape = decode = velocity


def test_a_model_is_named_and_what_is_no_class_of_ours_passes():
    with (
        pytest.raises(UserCodeError, match=r"test_user_errors:Velocity\.velocity failed: KeyError: 'clip'\n"),
        told(),
    ):
        Velocity().velocity(None, None, {})
    with pytest.raises(KeyError), told():
        {}["clip"]
    assert as_user_error(DataError("told")) is None
