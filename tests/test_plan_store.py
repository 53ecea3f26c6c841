"""Counts of models are kept on disk, and what is wrong or old there is counted again."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from plans import planned

from posttrain.planning import store as module
from posttrain.planning.counts import Counts
from posttrain.planning.profile import Profile, Segment
from posttrain.planning.store import SHIPPED, Store, description_of, identity, store_of
from posttrain.policy.tuning import Lora
from posttrain.recipe.file import load_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
SIZE = (64, 64)

# in one worker, which counts each model once
pytestmark = pytest.mark.xdist_group("plans")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A user's cache folder, and nothing that comes with the package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_shipped", dict)
    return tmp_path / "posttrain" / "counts"


def everything(counts):
    """One count of each kind, as values that can be compared."""
    tune = Lora(rank=4)
    memory = counts.memory("training", SIZE, tune)
    return [
        counts.shape(tune),
        counts.encoder_bytes(),
        counts.latent_shape(SIZE),
        counts.condition_bytes(),
        [counts.flops(work, SIZE) for work in ("forward", "text", "encode", "decode")],
        [memory.peak(rows) for rows in (0, 1, 7, 1000)],
        counts.autoencoder("decode", SIZE, 3),
        counts.text(24),
    ]


def test_a_second_plan_reads_what_the_first_counted(kept, monkeypatch):
    model = planned("sft").model
    fresh = everything(Counts(model, cuda=True))
    with store_of(model) as store:
        assert everything(Counts(model, cuda=True, store=store)) == fresh
    (file,) = kept.iterdir()
    monkeypatch.setattr(type(model), "outline", None)  # nothing may be counted
    with store_of(model) as store:
        assert everything(Counts(model, cuda=True, store=store)) == fresh
    # what is damaged counts as missing
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept.parent.parent))
    monkeypatch.setattr(module, "_shipped", dict)
    values = json.loads(file.read_text())
    for damaged in ("{", "[]", json.dumps(dict.fromkeys(values, "nonsense"))):
        file.write_text(damaged)
        with store_of(model) as store:
            assert everything(Counts(model, cuda=True, store=store)) == fresh
        assert json.loads(file.read_text()) == values


def test_other_settings_versions_and_sources_have_files_of_their_own(kept, monkeypatch):
    def counted(model):
        with store_of(model) as store:
            Counts(model, cuda=True, store=store).condition_bytes()

    model = planned("sft").model
    counted(model)
    counted(model.model_copy(update={"offload": True, "revision": "main"}))  # which change no count
    assert len(list(kept.iterdir())) == 1
    counted(model.model_copy(update={"max_sequence_length": 8}))
    monkeypatch.setattr(module, "versions", lambda names: dict.fromkeys(names, "0"))
    counted(model)
    monkeypatch.setattr(module, "_source", lambda: "changed")
    counted(model)
    assert len(list(kept.iterdir())) == 4


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path, monkeypatch):
    (tmp_path / "posttrain").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_shipped", dict)
    model = planned("sft").model
    with store_of(model) as store:
        assert Counts(model, cuda=True, store=store).condition_bytes() > 0


def test_models_of_other_packages_are_counted_each_time(monkeypatch):
    model = planned("sft").model
    assert description_of(model) is not None
    monkeypatch.setattr(type(model), "__module__", "another.package")
    assert description_of(model) is None
    with store_of(model) as store:
        assert store is None


def test_a_profile_is_the_same_after_its_lower_points_are_left_out():
    rising, falling = Segment(3), Segment(1)
    for fixed, each in ((10, 0), (-4, 2), (1, 1), (0, -3)):
        rising.add(fixed, each)
        falling.add(each, fixed)
    profile = Profile([rising, falling])
    again = Profile.from_json(json.loads(json.dumps(profile.as_json())))
    assert [again.peak(rows) for rows in range(20)] == [profile.peak(rows) for rows in range(20)]
    assert len(again.as_json()[0][3]) < len(rising.highs)


EVERY = [
    *(pytest.param(name, 1, id=f"{name} on one GPU") for name in ("sd35m-soar", "quickstart")),
    *(pytest.param(name, 3, id=name, marks=pytest.mark.matrix) for name in shipped_recipes()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpus"), EVERY)
def test_the_shipped_counts_are_what_is_counted(name, gpus):
    """If this fails after a change of what is counted: python benchmarks/count_shipped.py"""
    script = runpy.run_path(str(ROOT / "benchmarks" / "count_shipped.py"))
    kinds = script["counts_of"].__globals__
    kinds["GPUS"] = kinds["GPUS"][:gpus]
    recipe, store = load_recipe(name, checks=False), Store({})
    script["counts_of"](recipe, store)
    entry = json.loads(SHIPPED.read_text())[identity(description_of(recipe.model))]
    fresh = json.loads(json.dumps(store.kept))
    assert name in entry["recipes"]
    assert {key: entry["counts"].get(key) for key in fresh} == fresh


def test_a_first_plan_of_a_shipped_recipe_imports_no_model_library(tmp_path):
    code = (
        "import sys\nfrom posttrain.cli.app import main\n"
        "sys.argv = ['posttrain', 'plan', 'sd35m-soar-then-grpo', '--gpu', 'RTX 4090']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'diffusers', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    environment = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "posttrain").exists()
