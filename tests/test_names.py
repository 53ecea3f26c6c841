"""A recipe's module:function is looked for in the module's source, which is not run."""

import importlib.util

import pytest

from posttrain.rewards.callable import Callable
from posttrain.support.names import defined_names

DEFINED = """
import os.path as p, json
from math import pi as number
raise SystemExit("it was run")
def f(a, b=(inner := 1)): local = 1
async def g(): global made; made = 2
class C:
    inside = 1
x, (y, *z) = 1, (2, 3)
w: int = 3
try:
    import fast
except ImportError as error:
    fast = None
if x:
    for i in range(3):
        with open("a") as file: pass
(walrus := 3)
match x:
    case [head, *rest] as whole: pass
h = lambda q: q
"""
NAMES = {
    "p", "json", "number", "f", "g", "made", "C", "x", "y", "z", "w", "fast", "error", "i", "file", "walrus", "head", "rest",
    "whole", "h",
}  # fmt: skip


def names_of(folder, text):
    file = folder / "some_module.py"
    file.write_text(text)
    return defined_names(importlib.util.spec_from_file_location("some_module", file))


def test_the_names_that_a_module_defines(tmp_path):
    assert names_of(tmp_path, DEFINED) == NAMES


@pytest.mark.parametrize(
    "text",
    [
        "from math import *\n",
        "def __getattr__(name): ...\n",
        "globals()['f'] = 1\n",
        "exec('def f(): ...')\n",
    ],
)
def test_a_module_that_may_define_more_says_nothing(tmp_path, text):
    assert names_of(tmp_path, text) is None


def test_modules_without_a_source_say_nothing():
    assert defined_names(importlib.util.find_spec("sys")) is None


def test_check_tells_of_a_function_that_is_not_there_without_running_the_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward_that_is_not_run.py").write_text(
        "raise SystemExit('it was run')\ndef brightness(): ...\n"
    )
    assert Callable(function="reward_that_is_not_run:brightness").problem() is None
    problem = Callable(function="reward_that_is_not_run:brightnes").problem()
    assert "has no 'brightnes' (did you mean 'brightness'?)" in problem
    assert str(tmp_path / "reward_that_is_not_run.py") in problem
    (tmp_path / "reward_that_is_torn.py").write_text("def f(:\n")
    assert "is no Python" in Callable(function="reward_that_is_torn:f").problem()
    assert "no module" in Callable(function="reward_that_is_nowhere:f").problem()
