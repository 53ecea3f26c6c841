"""A reward's weights and tokenizer are accounted for like the model's."""

import importlib.util
import os
import shutil

import pytest
import torch
from test_loading import CHANGES, NAMES, replace, rewrite
from tiny_clip import tiny_clip

from posttrain.errors import RecipeError, RewardError
from posttrain.recipe.file import evaluation_settings
from posttrain.rewards._state import LAYERS, linear_head, read
from posttrain.rewards.aesthetic import Aesthetic
from posttrain.rewards.clipscore import CLIPScore
from posttrain.rewards.ocr import OCR

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "clip", copy_function=os.link)


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=NAMES)
def test_weights_of_a_network_that_do_not_fit_are_told(folder, change, words):
    CLIPScore(path=str(folder)).load(CPU)
    rewrite(folder / "model.safetensors", change)
    with pytest.raises(RewardError, match=rf"do not fit: {words}"):
        CLIPScore(path=str(folder)).load(CPU)


def test_positions_that_older_files_keep_are_no_fault(folder):
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")}
    rewrite(folder / "model.safetensors", lambda state: state.update(ids))
    CLIPScore(path=str(folder)).load(CPU)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]"], ids=["lost", "empty", "cut", "list"])
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"]
)
def test_a_file_that_is_lost_or_damaged_is_one_error(folder, tmp_path, file, content):
    replace(folder / file, content or b"")
    if content is None:
        (folder / file).unlink()
        for name in ("vocab.json", "merges.txt"):  # of which another tokenizer could be made
            (folder / name).unlink(missing_ok=True)
    torch.save(head(), tmp_path / "head.pt")
    with pytest.raises(RewardError, match=str(folder)) as found:
        Aesthetic(path=str(folder), head=str(tmp_path / "head.pt")).load(CPU)
    assert "\n" not in str(found.value)


def head(change=lambda state: None):
    sizes = [16, 12, 8, 4, 2, 1]
    state = {}
    for i, number in enumerate(LAYERS):
        state[f"layers.{number}.weight"] = torch.ones(sizes[i + 1], sizes[i])
        state[f"layers.{number}.bias"] = torch.ones(sizes[i + 1])
    change(state)
    return state


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=NAMES)
def test_weights_of_a_torch_file_that_do_not_fit_are_told(tmp_path, change, words):
    linear_head(head(), 16, tmp_path)
    with pytest.raises(RewardError, match=rf"do not fit: .*{words}"):
        linear_head(head(change), 16, tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 10, 100, 500, -1, -30])
def test_a_torch_file_that_is_cut_off_is_one_error(tmp_path, cut):
    file = tmp_path / "head.pt"
    torch.save(head(), file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(RewardError, match=r"cannot be read as a torch file of weights: .*") as found:
        read(file)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("reward", "setting", "words"),
    [
        ("ocr", [], "ocr needs 'rapidocr', which this install lacks: pip install 'posttrain\\[rewards\\]'"),
        ("clipscore", ["rewards.0.path=/gone"], "path: no config.json and .* at '/gone'"),
        ("no_such_module:judge", [], "no_such_module"),
    ],
)
def test_eval_says_that_a_reward_cannot_be_loaded_before_it_loads_the_model(
    tmp_path, monkeypatch, reward, setting, words
):
    (tmp_path / "p.txt").write_text('a sign that says "OPEN"\n')
    monkeypatch.setattr(OCR, "requires", ("rapidocr",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=words):
        evaluation_settings(None, None, str(tmp_path / "p.txt"), [reward], setting)
