"""A class of the user's own that lacks something is one error, which names the class and what to write."""

import importlib
import sys

import pytest
from runs import HEAD, stage

from posttrain.algorithm import Algorithm
from posttrain.engine.rehearsal import rehearse
from posttrain.errors import AlgorithmError, RecipeError
from posttrain.recipe.file import parse_recipe

HEADER = """
from typing import ClassVar, Literal
import torch
from pydantic import model_validator
from posttrain.algorithm import Algorithm

class M(Algorithm):
"""
TYPE = '    type: Literal["unfinished"] = "unfinished"\n'
NEEDS = '    needs: ClassVar = "images"\n'
METHODS = "    def collect(self, batch, tools): ...\n    def loss(self, items, policy): ...\n"
FAULTS = {
    "no default": ('    type: Literal["unfinished"]\n' + NEEDS + METHODS, r"type: Literal\['unfinished'\] = "),
    "other default": (TYPE.replace('= "', '= "x') + NEEDS + METHODS, r"must be one literal that is also its"),
    "two names": (TYPE.replace('["', '["a", "') + NEEDS + METHODS, r"must be one literal that is also its"),
    "no needs": (TYPE + METHODS, r"'unfinished' does not say what it needs: write needs: ClassVar = 'images'"),
    "no loss": (TYPE + NEEDS + METHODS.partition("\n")[0], r"cannot make 'own:M': .* abstract method '?loss"),
    "no annotation": (TYPE + NEEDS + "    scale = 1\n" + METHODS, r"`scale = 1`.*own\.py, line 7\)$"),
    "a tensor": (TYPE + NEEDS + "    w: torch.Tensor\n" + METHODS, r"schema for <class 'torch.Tensor'>.*line 7\)$"),
    "no such name": (TYPE + NEEDS + "    k: 'Nope' = 1\n" + METHODS, r"'own:M': name 'Nope' is not defined$"),
    "a bad default": (TYPE + NEEDS + "    k: int = 'five'\n" + METHODS, r"algorithm\.k .*expected a whole number, found the text 'five'"),
    "an init": (TYPE + NEEDS + "    def __init__(self): ...\n" + METHODS, r"cannot make 'own:M': .*__init__\(\)"),
    "no self": (
        TYPE + NEEDS + "    @model_validator(mode='after')\n    def ok(self): ...\n" + METHODS,
        r"a validator of 'own:M' returns None: let it return self",
    ),
    "no groups": (
        TYPE + NEEDS + "    samples_per_prompt: ClassVar = 0\n" + METHODS,
        r"samples_per_prompt of 'unfinished' is 0, no whole number from 1 on",
    ),
}  # fmt: skip
"""What is wrong -> the class, and what is told."""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file of a module ``own`` of the user's, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(Algorithm, "variants", dict(Algorithm.variants))
    importlib.invalidate_caches()
    yield tmp_path / "own.py"
    sys.modules.pop("own", None)


def parsed():
    return parse_recipe(HEAD + "stages:\n" + stage("own", "{type: own:M}"), "r.yaml")


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unfinished_class_is_told_at_its_line_of_the_recipe(own, fault):
    text, words = FAULTS[fault]
    own.write_text(HEADER + text)
    with pytest.raises(RecipeError, match=words) as told:
        parsed()
    assert str(told.value).startswith("r.yaml:")
    assert "\n" not in str(told.value)


def test_a_class_that_is_incomplete_does_not_spoil_the_blocks_of_others(own):
    own.write_text(HEADER + FAULTS["no such name"][0])
    sys.path.append(str(own.parent))
    importlib.import_module("own")
    assert (
        parse_recipe(HEAD + "stages:\n" + stage("a", "{type: sft}"), "r.yaml").stages[0].algorithm.type
        == "sft"
    )


@pytest.mark.parametrize("text", ["import sys\nsys.exit()\n", "(\n"])
def test_a_module_that_ends_the_program_or_is_torn_is_told_once(own, text):
    own.write_text(text)
    with pytest.raises(
        RecipeError, match=r"cannot load the algorithm 'own:M': (SystemExit|SyntaxError)"
    ) as told:
        parsed()
    assert str(told.value).count(", line ") == 1
    assert "frozen" not in str(told.value)


class Empty(Algorithm):
    """An algorithm that returns nothing."""

    needs = "images"

    def collect(self, batch, tools): ...

    def loss(self, items, policy): ...


def test_a_plan_refuses_what_a_run_refuses():
    with pytest.raises(AlgorithmError, match="collect of 'empty' returned NoneType, not Items"):
        rehearse(Empty(type="empty"))
