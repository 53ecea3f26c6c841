"""The CPU's memory that is free in a container, whose limit may be lower than the machine's memory."""

import sys

import pytest
import torch

from posttrain.support import device
from posttrain.support.device import available_memory

STAT = "anon 200\nfile 700\ninactive_file 650\nactive_file 50\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such files")
@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"max": "1000\n", "current": "900\n", "stat": STAT}, 750),  # what was read or written is given up
        ({"max": "1000\n", "current": "900\n", "stat": STAT.replace("650", "0")}, 100),
        ({"max": "max\n", "current": "900\n", "stat": STAT}, None),
        ({"max": "1000\n", "current": "900\n"}, None),
        ({}, None),
    ],
)
def test_what_a_container_may_still_take(tmp_path, monkeypatch, files, free):
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    found = available_memory(torch.device("cpu"))
    assert found == free or (free is None and found is not None and found > 10**6), "else the machine's"
