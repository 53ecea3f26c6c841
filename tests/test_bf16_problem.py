"""Devices that cannot be used are refused, and a GPU that computes bf16 slowly is named before a stage trains in it."""

import pytest
import torch
from runs import TRAIN, recipe, run_quietly, stage

from posttrain.errors import RecipeError
from posttrain.stages import prepare
from posttrain.support.device import bf16_problem, resolve

CUDA = torch.device("cuda")


def test_only_gpus_without_units_for_bf16_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    found = {}
    for capability in ((7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        found[capability] = bf16_problem(CUDA)
    assert [capability for capability, reason in found.items() if reason] == [(7, 0), (7, 5)]
    assert found[7, 5].startswith("Tesla T4 has no units for bf16")
    assert bf16_problem(torch.device("cpu")) is None


def test_a_stage_in_bf16_says_so_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "bf16_problem", lambda device: "a T4 has no units for bf16")
    short = TRAIN.replace("steps: 6", "steps: 2")
    both = [stage("fp32", train=short), stage("bf16", train=short.replace("{", "{precision: bf16, "))]
    printed = run_quietly(recipe(*both), tmp_path / "run")
    assert [line for line in printed.splitlines() if "T4" in line] == ["bf16: a T4 has no units for bf16"]


@pytest.mark.parametrize("name", ["meta", "xpu", "cpux", ""])
def test_a_device_on_which_nothing_here_runs_is_refused(name):
    with pytest.raises(RecipeError, match=f"device: no '{name}': one of 'auto', 'cpu'"):
        resolve(name)
    assert resolve("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("seen", "index"), [(4, 3), (1, 0)])  # Slurm may show each process its own GPU alone
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_its_own_gpu(monkeypatch, name, seen, index):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert resolve(name) == torch.device("cuda", index)
