import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests of a file that share a fixture run in one process, so that the fixture is made once."""
    for item in items:
        made = (fixtures[-1] for fixtures in item._fixtureinfo.name2fixturedefs.values())
        if any(fixture.scope in ("module", "session") and fixture.baseid for fixture in made):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
