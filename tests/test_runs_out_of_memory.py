"""A run goes on when memory does not suffice, at once or by the same command, and remembers it."""

import json
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from runs import EVALUATION, HEAD, TRAIN, recipe, run_quietly, stage
from small_memory import no_room_for, remembered
from test_run import assert_equal_weights, weights

from posttrain.engine.checkpoint_folder import saved
from posttrain.errors import TrainingError
from posttrain.models.sd3 import SD3FlowModel
from posttrain.parallel.single import Alone
from posttrain.recipe.file import parse_recipe
from posttrain.stages.micro_batch import remember, settled


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A finished run of the plain recipe."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run_quietly(recipe(stage("sft")), folder)
    return folder


@pytest.mark.parametrize("block", ["{strategy: ddp}", "{strategy: fsdp2}"])
def test_a_backward_that_failed_under_a_strategy_with_hooks_ends_the_run(tmp_path, plain, monkeypatch, block):
    """DDP and FSDP keep a failed backward's state: what they were to train after it would not be trained."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            if len(gradient) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradient

    made = recipe(stage("sft"), overrides=[f"parallel={block}"])
    embed = SD3Transformer2DModel.forward

    def forward(self, hidden_states, encoder_hidden_states, *rest, **named):
        return embed(
            self, hidden_states, Failing.apply(encoder_hidden_states.requires_grad_()), *rest, **named
        )

    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    with pytest.raises(TrainingError, match=r"sft: out of memory with 4 .* last checkpoint with 2"):
        run_quietly(made, tmp_path / "run")
    assert remembered(tmp_path / "run") == 2
    run_quietly(made, tmp_path / "run")
    one, other = (weights(folder / "sft") for folder in (tmp_path / "run", plain))
    assert all((one[n] - other[n]).norm() <= 1e-5 * other[n].norm() for n in other)


def test_a_run_out_of_memory_goes_on_in_halves_and_remembers_it(tmp_path, monkeypatch):
    two = TRAIN.replace("micro_batch: 4", "micro_batch: 2")
    run_quietly(recipe(stage("sft", train=two)), tmp_path / "two")
    with monkeypatch.context() as patch:
        no_room_for(4, patch)
        run_quietly(recipe(stage("sft")), tmp_path / "run")
    assert_equal_weights(weights(tmp_path / "run" / "sft"), weights(tmp_path / "two" / "sft"))
    assert remembered(tmp_path / "run") == 2
    # a run that goes on begins with what was found
    seen = []
    velocity = SD3FlowModel.velocity
    monkeypatch.setattr(
        SD3FlowModel, "velocity", lambda self, x, *rest: seen.append(len(x)) or velocity(self, x, *rest)
    )
    (tmp_path / "run" / "sft" / "stage.json").unlink()
    shutil.rmtree(saved(tmp_path / "run" / "sft" / "checkpoints")[-1])
    run_quietly(recipe(stage("sft")), tmp_path / "run")
    assert set(seen) == {2}


def test_a_run_that_cannot_repeat_a_step_stops_and_goes_on_with_half(tmp_path, monkeypatch):
    made = recipe(stage("sft"))
    with monkeypatch.context() as patch:
        no_room_for(4, patch)
        patch.setattr(Alone, "repeatable", False)
        with pytest.raises(TrainingError, match=r"sft: out of memory with 4 .* last checkpoint with 2"):
            run_quietly(made, tmp_path / "run")
        run_quietly(made, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "sft" / "stage.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", *(f'{{"micro_batch": {v}}}' for v in ("0", "-3", '"x"', "1.5", "true"))],
)
def test_a_damaged_memory_of_the_micro_batch_is_ignored(tmp_path, content):
    made = recipe(stage("sft"))
    folder = tmp_path / "s"
    folder.mkdir()
    remember(made, folder, 1, 2)
    assert settled(made, made.stages[0], folder, 1) == 2
    assert settled(made, made.stages[0], folder, 2) == 4
    whole = json.loads((folder / "micro_batch.json").read_text())
    if content.startswith('{"'):
        content = json.dumps({**whole, **json.loads(content)})
    (folder / "micro_batch.json").write_text(content)
    assert settled(made, made.stages[0], folder, 1) == 4


def test_evaluation_goes_on_in_halves_too(tmp_path, monkeypatch):
    made = parse_recipe(f"{HEAD}stages: []\n{EVALUATION}", "small.yaml")
    velocity = SD3FlowModel.velocity

    def limited(self, latents, sigma, condition):
        if len(latents) > 4:  # two branches of guidance
            raise torch.OutOfMemoryError("out of memory")
        return velocity(self, latents, sigma, condition)

    monkeypatch.setattr(SD3FlowModel, "velocity", limited)
    run_quietly(made, tmp_path / "run")
    assert (tmp_path / "run" / "base" / "evaluation" / "eval.json").is_file()
