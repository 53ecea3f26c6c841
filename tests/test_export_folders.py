"""What an export is made from and where it goes: links, earlier exports, and LoRAs that others lie below."""

import json
import os
from pathlib import Path

import pytest
import torch
from runs import recipe, stage
from safetensors.torch import load_file, save_file

from posttrain.errors import ModelError, PosttrainError
from posttrain.stages.artifact import open_artifact
from posttrain.stages.export import export, trained_at
from posttrain.stages.lineage import describe, exact, with_parents
from posttrain.weights.lora_file import joined
from posttrain.weights.transformer import LORA

LAYER = "transformer.proj_out"


def lora(folder, rank=2, end="lora_{}.weight", **stated):
    """A LoRA of ones for a layer of width 3, with what its metadata states of peft's configuration."""
    folder.mkdir(parents=True)
    pair = {"A": torch.ones(rank, 3), "B": torch.ones(3, rank)}
    tensors = {f"{LAYER}.{end.format(side)}": tensor for side, tensor in pair.items()}
    about = json.dumps({f"transformer.{name}": value for name, value in stated.items()})
    save_file(tensors, folder / LORA, {"lora_adapter_metadata": about} if stated else None)
    return folder


def finished(folder, *parents, **more):
    """The folder of a stage that trained a LoRA on top of others."""
    final = lora(folder / "final", r=2, lora_alpha=2)
    model = {"type": "sd3", "path": "not/loaded"}
    content = {"model": model, "parents": parents, "weights": "raw", "dtype": "fp32", **more}
    (final / "posttrain.json").write_text(json.dumps(content))
    return folder


def test_a_lora_is_not_exported_without_one_below_it(tmp_path):
    finished(tmp_path / "one")
    two = trained_at(str(finished(tmp_path / "two", "../../one/final")))
    export(two, tmp_path / "whole")
    assert load_file(tmp_path / "whole" / LORA)[f"{LAYER}.lora_A.weight"].shape == (4, 3)
    for lost in (tmp_path / "one" / "final" / LORA, tmp_path / "one"):
        lost.rename(tmp_path / f"lost-{lost.name}")
        for attempt in (
            lambda: export(two, tmp_path / "x"),
            lambda: open_artifact(str(tmp_path / "two"), torch.device("cpu")),
        ):
            with pytest.raises(
                ModelError, match=r"a LoRA on top of '[^.]*/one/final', which holds no weights"
            ):
                attempt()
    assert not (tmp_path / "x").exists()


STATED = [
    ({}, 2),  # alpha is the rank
    ({"r": 2, "lora_alpha": 4}, 4),
    ({"r": 2, "lora_alpha": 4, "use_rslora": True}, 4 * 2**0.5),
    ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"proj_out": 8, "other": 5}}, 8),
]


@pytest.mark.parametrize(("stated", "change"), STATED)
def test_a_lora_of_another_tool_is_joined_at_the_scale_that_it_states(tmp_path, stated, change):
    own = finished(tmp_path / "own") / "final"
    layers, config = joined([lora(tmp_path / "other", **stated) / LORA, own / LORA])
    down, up = layers["proj_out"]
    torch.testing.assert_close(up @ down, torch.full((3, 3), change + 2.0))
    assert config["r"] == config["lora_alpha"] == 4


@pytest.mark.parametrize("end", ["lora.{}.weight", "lora_{}.bias"])
def test_weights_that_cannot_be_joined_are_told(tmp_path, end):
    other, own = lora(tmp_path / "other", end=end), finished(tmp_path / "own") / "final"
    with pytest.raises(
        ModelError, match=rf"other/{LORA}' cannot be joined .*: 2 of its weights, such as 'tr"
    ):
        joined([other / LORA, own / LORA])


def test_a_link_to_what_a_stage_wrote_stands_for_it(tmp_path):
    final = finished(tmp_path / "run" / "full") / "final"
    (final.parent / "exact").mkdir()
    (tmp_path / "best").symlink_to(final)
    assert exact(tmp_path / "best") == exact(final) == final.parent / "exact"
    assert trained_at(str(tmp_path / "best")).final == final


def test_parents_are_found_from_a_run_below_a_link(tmp_path):
    start = finished(tmp_path / "loras" / "start") / "final"
    (tmp_path / "disk" / "deep" / "runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "deep" / "runs")
    made = recipe(stage("one"))
    own = finished(tmp_path / "runs" / "r") / "final"
    content = describe(made.model, [start], made.stages[0], own, {})
    (own / "posttrain.json").write_text(json.dumps(content))
    assert [Path(os.path.realpath(folder)) for folder in with_parents(own)] == [start, own.resolve()]


@pytest.mark.parametrize("there", [True, False], ids=["empty", "dangling"])
def test_an_export_goes_to_where_a_link_leads(tmp_path, there):
    trained, disk, link = trained_at(str(finished(tmp_path / "one"))), tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    if there:
        (disk / "exports").mkdir()
    link.symlink_to(disk / "exports")
    export(trained, link)
    export(trained, link, overwrite=True)
    assert link.is_symlink()
    assert (disk / "exports" / LORA).is_file()
    assert sorted(os.listdir(tmp_path)) == ["disk", "link", "one"]
    assert os.listdir(disk) == ["exports"]


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    trained = trained_at(str(finished(tmp_path / "one")))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (Path(), tmp_path / "here"):
        with pytest.raises(
            PosttrainError, match="is the current folder, and would be replaced: give another"
        ):
            export(trained, target)
    assert os.listdir(tmp_path / "here") == []


@pytest.mark.parametrize("kind", ["comfyui", "kohya"])
def test_what_was_exported_for_another_tool_is_not_exported_again(tmp_path, kind):
    final = finished(tmp_path / "made", format=kind) / "final"
    (final / LORA).rename(final / "made.safetensors")
    with pytest.raises(ModelError, match=f"is an export as {kind}, which is read by other tools"):
        trained_at(str(final))
