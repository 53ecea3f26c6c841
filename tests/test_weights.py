"""Weights are fetched whole, resumed where they were cut off, and refused where they are damaged."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from forked import start
from huggingface_hub import constants, file_download
from servers import Hub, serving

from posttrain.errors import RewardError
from posttrain.scoring import catalogue
from posttrain.weights.files import sha256
from posttrain.weights.hub import fetch
from posttrain.weights.published import Weights

ROOT = Path(__file__).parent.parent
BIG = np.random.default_rng(0).bytes(600_000)
FILES = {"config.json": (b"{}", False), "model.safetensors": (BIG, True), "README.md": (b"unwanted", False)}
WANTED = ("config.json", "*.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, an empty cache, and no wait before a retry."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub = Hub({"some/model": dict(FILES)})
    with serving(hub.handler()) as hub.url:
        yield hub


def leftovers(tmp_path):
    return sorted(p.suffix for p in (tmp_path / "cache").rglob("blobs/*") if p.suffix)


def test_what_is_fetched_is_whole_and_then_found_without_the_hub(hub, tmp_path, monkeypatch):
    folder = fetch("some/model", WANTED, hub.url)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == BIG
    assert sha256(folder / "model.safetensors") == hub.hash(BIG, True)
    assert hub.ranges == [None, None]
    fetch("some/model", WANTED, hub.url)
    assert len(hub.ranges) == 2, "nothing was downloaded twice"
    assert leftovers(tmp_path) == []
    assert Weights(WANTED, 1, "MIT").local("some/model") == folder
    assert Weights(("pytorch_model.bin",), 1, "MIT").local("some/model") is None


def test_a_connection_that_is_cut_goes_on_where_it_was(hub):
    hub.cuts = [None, 400_000]
    folder = fetch("some/model", WANTED, hub.url)
    assert (folder / "model.safetensors").read_bytes() == BIG
    start = int(hub.ranges[2].removeprefix("bytes=").rstrip("-"))
    assert 300_000 < start <= 400_000


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(hub, tmp_path):
    hub.cuts = [None, 200_000, *[1] * 20]
    with pytest.raises(RewardError, match=r"cannot fetch config.json, \*.safetensors of 'some/model'"):
        fetch("some/model", WANTED, hub.url)
    assert leftovers(tmp_path) == [".part"]
    hub.cuts, hub.ranges = [], []
    folder = fetch("some/model", WANTED, hub.url)
    assert (folder / "model.safetensors").read_bytes() == BIG
    (asked,) = hub.ranges
    assert int(asked.removeprefix("bytes=").rstrip("-")) > 150_000
    assert leftovers(tmp_path) == []


def test_large_files_come_from_elsewhere_which_is_not_told_the_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.elsewhere = hub.url.replace("127.0.0.1", "localhost")
    hub.cuts = [None, 400_000]
    folder = fetch("some/model", WANTED, hub.url)
    assert (folder / "model.safetensors").read_bytes() == BIG
    told = [(path.startswith("/elsewhere"), token) for path, token in hub.tokens]
    assert set(told) == {(False, "Bearer hf_secret"), (True, None)}
    assert hub.ranges[-1].startswith("bytes=3")


def test_processes_that_want_the_same_file_at_once_all_get_it(hub, tmp_path):
    children = [start(fetch, "some/model", WANTED, hub.url) for _ in range(3)]
    for child in children:
        child.join(300)
        assert child.exitcode == 0
    assert (fetch("some/model", WANTED, hub.url) / "model.safetensors").read_bytes() == BIG
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_is_deleted_and_an_error(hub, tmp_path, name):
    content = FILES[name][0]
    hub.sent[name] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(RewardError, match=f"{name} of 'some/model' is damaged and was deleted"):
        fetch("some/model", WANTED, hub.url)
    assert leftovers(tmp_path) == []
    hub.sent.clear()
    assert (fetch("some/model", WANTED, hub.url) / name).read_bytes() == content


def test_a_file_that_was_damaged_on_disk_is_noticed(hub):
    file = fetch("some/model", WANTED, hub.url) / "model.safetensors"
    file.resolve().write_bytes(BIG[:-1] + bytes([BIG[-1] ^ 1]))
    with pytest.raises(RewardError, match="damaged"):
        fetch("some/model", WANTED, hub.url)
    assert fetch("some/model", WANTED, hub.url).joinpath("model.safetensors").read_bytes() == BIG


@pytest.mark.parametrize(
    ("repo", "patterns", "words"),
    [
        ("some/model", ("*.bin",), r"'some/model' has no \*.bin"),
        ("no/such", ("a",), "cannot fetch a of 'no/such'"),
    ],
)
def test_what_the_hub_has_not_is_named(hub, repo, patterns, words):
    with pytest.raises(RewardError, match=words):
        fetch(repo, patterns, hub.url)


def posttrain(*arguments, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", **environment}
    command = [sys.executable, "-m", "posttrain", "rewards", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_the_command_line_fetches_a_rewards_weights_and_then_lists_them_as_here(tmp_path):
    clip = {"preprocessor_config.json": (b"{}", False), "tokenizer.json": (b"[]", False)}
    hub = Hub(
        {
            "yuvalkirstain/PickScore_v1": dict(FILES),
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": clip,
        }
    )
    with serving(hub.handler()) as url:
        environment = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = posttrain("fetch", "pickscore", **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("complete and as published") == 2
    (row,) = (r for r in posttrain(HF_HOME=str(tmp_path)).stdout.splitlines() if r.startswith("pickscore"))
    assert row.split()[-1] == "ready"


def test_a_reward_without_weights_and_one_that_is_none_are_told_apart():
    with pytest.raises(RewardError, match="shapes needs no weights"):
        next(catalogue.fetch("shapes"))
    with pytest.raises(RewardError, match="did you mean 'pickscore'"):
        next(catalogue.fetch("pickscor"))
