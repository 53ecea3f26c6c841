"""A plug-in that fails breaks itself only, is named once, and is named again where its type is needed."""

import asyncio
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
from runs import DATA, HEAD, TRAIN
from starlette.datastructures import Headers

from posttrain.errors import ModelError, RewardError
from posttrain.evaluation.report.meaning import meaning
from posttrain.recipe.messages import from_plugins
from posttrain.registry import Named
from posttrain.reward import Reward
from posttrain.scoring.catalogue import listing, reward_named
from posttrain.scoring.server.app import Service
from posttrain.scoring.server.limits import Limits
from posttrain.stages.artifact import open_artifact
from posttrain.support import plugins
from posttrain.support.plugins import LOADED, PluginWarning, load_plugins, missing_type, package_of

ROOT = Path(__file__).parent.parent
WHOLE = """
from typing import Literal
from test_plugins import Toy
class {kind}(Toy):
    type: Literal["{name}"] = "{name}"
"""


class Toy(Named):
    type: str


def package(site, name, group="toys", **modules):
    """A package of ``modules`` (name -> text) with an entry point for each, as pip leaves it."""
    info = site / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{m} = {m}\n" for m in modules))
    for module, text in modules.items():
        (site / f"{module}.py").write_text(text)


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "LOADED", {})
    monkeypatch.setattr(Toy, "variants", {})
    return tmp_path


FAULTS = {
    "lacks": ("import nowhere_to_be_found\n", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    "raises": ("raise ValueError('first line\\nlast line')\n", "ValueError: last line"),
    "torn": ("def broken(:\n", "SyntaxError: invalid syntax"),
    "leaves": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "halfway": (WHOLE.format(kind="Half", name="half") + "1 / 0\n", "ZeroDivisionError: division by zero"),
    "undefined": (WHOLE.format(kind="Open", name="open") + "    field: 'Nothing'\n", "Nothing"),
}


@pytest.mark.parametrize("module", FAULTS)
def test_a_faulty_plug_in_is_named_once_and_the_others_are_loaded(site, module):
    text, error = FAULTS[module]
    name = f"{module}_{len(sys.modules)}"  # a module of its own in each process
    package(site, "faulty", **{name: text})
    package(site, "sound", **{f"sound_{name}": WHOLE.format(kind="Sound", name="sound")})
    with pytest.warns(
        PluginWarning, match=rf"'{name}' \({name}\) of the package faulty 1.2 .*left out"
    ) as told:
        load_plugins("toys", Toy.variants)
    assert len(told) == 1
    assert error in str(told[0].message)
    assert list(Toy.variants) == ["sound"]
    assert package_of("toys", "sound") == "sound 1.2"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_plugins("toys", Toy.variants)  # named once
    wanted = {"halfway": "half", "undefined": "open"}.get(module, name)
    assert missing_type("toys", wanted).startswith(
        f"; type {wanted!r} comes with the package faulty 1.2, whose entry point {name!r} failed: "
    )
    assert error in missing_type("toys", wanted)
    assert "may come with the package faulty" in missing_type("toys", "other")
    assert missing_type("other.group", wanted) == ""


def test_what_a_failing_plug_in_had_imported_stays(site):
    (site / "inner_of_outer.py").write_text(WHOLE.format(kind="Inner", name="inner"))
    package(site, "outer", outer_that_fails="import inner_of_outer\n1 / 0\n")
    with pytest.warns(PluginWarning):
        load_plugins("toys", Toy.variants)
    assert list(Toy.variants) == ["inner"]


@pytest.mark.parametrize("other", [{"RANK": "1"}, {"RANK": "0", "POSTTRAIN_CHILD": "7"}])
def test_one_of_several_processes_tells_of_it(site, monkeypatch, other):
    package(site, "faulty", silent="1 / 0\n")
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_plugins("toys", Toy.variants)
    assert missing_type("toys", "silent")


def test_a_reward_that_does_not_say_its_range_is_listed_told_of_and_served(monkeypatch):
    monkeypatch.setattr(Reward, "variants", dict(Reward.variants))

    class Endless(Reward):
        type: Literal["endless"] = "endless"

        def load(self, device): ...

    lines = listing().plain.splitlines()
    assert any(line.split()[:4] == ["endless", "nan", "to", "nan"] for line in lines)
    assert any(line.startswith("shapes ") for line in lines)
    assert meaning({"type": "endless"}, higher=True) == (
        "Its class, Endless, does not say what it measures. Without bounds; higher is better."
    )
    request, batcher = SimpleNamespace(headers=Headers()), SimpleNamespace(problem=None)
    health = asyncio.run(Service(Endless(), batcher, Limits(), None).health(request))
    assert (health["name"], health["range"]) == ("endless", [None, None])


def failed(group, name):
    return plugins.Plugin(group, name, name, "far 2.0", (), "ImportError: libfar.so")


def test_errors_about_a_missing_type_name_the_plug_in(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "LOADED", dict(LOADED))
    for group in ("posttrain.models", "posttrain.rewards", "posttrain.algorithms"):
        plugins.LOADED[group, "far", "far"] = failed(group, "far")
    comes = (
        "type 'far' comes with the package far 2.0, whose entry point 'far' failed: ImportError: libfar.so"
    )
    with pytest.raises(RewardError, match=comes):
        reward_named("far")
    assert from_plugins("far", ["sft", "soar"]) == f"; {comes}"
    assert from_plugins("far", ["single", "ddp"]) == ""  # strategies come with no plug-in
    description = {"model": {"type": "far"}, "weights": "raw", "parents": []}
    (tmp_path / "posttrain.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match=comes):
        open_artifact(str(tmp_path), None)
    description["model"] = {"type": "sd3", "path": 3}
    (tmp_path / "posttrain.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match=r"valid string$"):
        open_artifact(str(tmp_path), None)


def test_the_command_line_goes_on_without_a_faulty_plug_in(tmp_path):
    package(tmp_path, "faulty", "posttrain.algorithms", far="import nowhere_to_be_found\n")
    recipe = (
        HEAD + f"stages:\n  - name: a\n    algorithm: {{type: NAME}}\n    data: {DATA}\n    train: {TRAIN}\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "COLUMNS": "60"}
    (tmp_path / "r.yaml").write_text(recipe.replace("NAME", "far"))
    command = [sys.executable, "-m", "posttrain", "check", "r.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    warned, refused = done.stderr.splitlines()
    fault = "ModuleNotFoundError: No module named 'nowhere_to_be_found'"
    assert warned == (
        f"warning: the plug-in 'far' (far) of the package faulty 1.2 cannot be loaded, so it is left out: {fault}"
    )
    assert refused.startswith("error: r.yaml:")
    assert refused.endswith(
        f"type 'far' comes with the package faulty 1.2, whose entry point 'far' failed: {fault}"
    )
