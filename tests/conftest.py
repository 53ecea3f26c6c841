import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from posttrain.algorithm import Algorithm
from posttrain.data.family import Data
from posttrain.model import Model
from posttrain.reward import Reward

FAMILIES = Algorithm, Data, Model, Reward

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# the same examples each time, however long one takes: a test that fails is one of the change, not of chance
settings.register_profile(
    "posttrain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("posttrain")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests of a file that share a fixture run in one process, so that the fixture is made once."""
    for item in items:
        made = (fixtures[-1] for fixtures in item._fixtureinfo.name2fixturedefs.values())
        if any(fixture.scope in ("module", "session") and fixture.baseid for fixture in made):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.hookimpl(tryfirst=True)  # before the test's fixtures are made
def pytest_runtest_setup(item):
    """Draws without a generator of their own are the same in every run, and whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_types():
    """What a test registers beside the package's own types, no other test finds."""
    before = [(family, set(family.variants)) for family in FAMILIES]
    yield
    for family, names in before:
        for name in set(family.variants) - names:
            if family.variants[name].__module__.partition(".")[0] != "posttrain":
                del family.variants[name]


@pytest.fixture
def own_caches(tmp_path_factory, monkeypatch):
    """Caches of this project and of the library datasets that no other program uses."""
    import datasets

    folder = tmp_path_factory.getbasetemp() / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
