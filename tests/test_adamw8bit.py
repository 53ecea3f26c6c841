"""AdamW with moments of 8 bits trains like AdamW in a quarter of the memory, or is refused by line."""

import shutil

import pytest
import torch
from pipelines import load
from runs import TRAIN, recipe, run_quietly, stage
from stored import whole_state
from test_run import assert_equal_weights, weights

from posttrain.engine.checkpoint_folder import saved
from posttrain.errors import RecipeError
from posttrain.optim import optimizers
from posttrain.optim.optimizers import optimizer_of
from posttrain.optim.settings import Train


def test_an_optimizer_of_8_bits_trains_alike_and_goes_on_exactly(tmp_path):
    eight = TRAIN.replace("{", "{optimizer: adamw8bit, ").replace(
        "checkpoint_every: 2", "checkpoint_every: 3"
    )
    made = recipe(stage("sft", train=eight))
    run_quietly(made, tmp_path / "eight")
    run_quietly(recipe(stage("sft")), tmp_path / "plain")
    trained, full = (weights(folder / "sft") for folder in (tmp_path / "eight", tmp_path / "plain"))
    start = dict(load().transformer.named_parameters())
    for name, tensor in full.items():
        moved = (tensor - start.get(name, tensor)).norm()
        assert (trained[name] - tensor).norm() <= 0.2 * moved, name
    folder = tmp_path / "eight" / "sft"
    states = saved(folder / "checkpoints")
    state = whole_state(states[-1])["optimizer"]
    assert any(moments["state1"].dtype == torch.uint8 for moments in state.values())
    (folder / "stage.json").unlink()
    shutil.rmtree(states[-1])
    run_quietly(made, tmp_path / "eight")
    assert_equal_weights(weights(folder), trained)


def test_an_optimizer_of_8_bits_takes_a_quarter():
    weight = torch.nn.Parameter(torch.randn(256, 256))
    weight.grad = torch.randn(256, 256)
    optimizer = optimizer_of(Train(steps=1, optimizer="adamw8bit"), [weight])
    optimizer.step()
    held = sum(t.nbytes for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor))
    assert held < 0.3 * 8 * weight.numel()


@pytest.mark.parametrize("block", ["{strategy: fsdp2}", "{strategy: deepspeed, zero_stage: 2}"])
def test_an_optimizer_of_8_bits_is_refused_where_weights_are_in_parts(block):
    eight = TRAIN.replace("{", "{optimizer: adamw8bit, ")
    with pytest.raises(RecipeError, match=r"train\.optimizer.*adamw8bit needs whole weights.*ddp"):
        recipe(stage("sft", train=eight), overrides=[f"parallel={block}"])


def test_an_optimizer_that_is_not_installed_is_refused_by_line(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"stages\.0\.train\.optimizer.*pip install 'posttrain\[8bit\]'"):
        recipe(stage("sft", train=TRAIN.replace("{", "{optimizer: adamw8bit, ")))
