"""Tests of the ``train`` block: defaults, bounds, conflicting settings, and the optimizer that it describes."""

import sys
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from posttrain.optim import optimizers
from posttrain.optim.optimizers import optimizer_of, problem
from posttrain.optim.settings import Train

DEFAULTS = {
    "batch_size": 32,
    "steps_per_batch": 1,
    "micro_batch": 8,
    "optimizer": "adamw",
    "learning_rate": 2e-5,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 1e-2,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "max_grad_norm": 1.0,
    "ema": None,
    "precision": "fp32",
    "gradient_checkpointing": "off",
    "compile": False,
    "log_every": 10,
    "stop_after_refused": 3,
    "checkpoint_every": 500,
    "checkpoint_minutes": 15.0,
    "keep_checkpoints": 2,
    "keep_every": None,
    "keep_best": None,
    "sample_every": 500,
}


def test_the_defaults_are_those_that_are_documented():
    assert Train(steps=3).model_dump() == {"steps": 3, **DEFAULTS}


ALLOWED = {
    "steps": [1],
    "batch_size": [1],
    "steps_per_batch": [1],
    "micro_batch": [1, 7, "auto"],
    "optimizer": ["adamw8bit"],
    "learning_rate": [1e-30],
    "schedule": ["cosine", "linear"],
    "warmup_steps": [0, 499],
    "weight_decay": [0.0],
    "betas": [[0.0, 0.0], [0.5, 0.9999]],
    "eps": [1e-30],
    "max_grad_norm": [1e-30],
    "ema": [1e-9, 0.9999, None],
    "precision": ["bf16"],
    "gradient_checkpointing": ["selective", "full"],
    "compile": [True],
    "stop_after_refused": [1],
    "log_every": [1],
    "checkpoint_every": [1],
    "checkpoint_minutes": [0, 0.5, None],
    "keep_checkpoints": [1],
    "keep_every": [500, 1500],
    "keep_best": ["ocr"],
    "sample_every": [1, None],
}
REFUSED = {
    "steps": [0, 1.5],
    "batch_size": [0],
    "steps_per_batch": [0],
    "micro_batch": [0, True, "8", None, 2.0],
    "optimizer": ["sgd"],
    "learning_rate": [0.0, float("inf"), float("nan")],
    "schedule": ["step"],
    "warmup_steps": [-1],
    "weight_decay": [-1e-9],
    "betas": [[0.9], [0.9, 0.9, 0.9], [1.0, 0.9], [0.9, 1.0], [-0.1, 0.9]],
    "eps": [0.0],
    "max_grad_norm": [0.0],
    "ema": [0.0, 1.0],
    "precision": ["fp16"],
    "gradient_checkpointing": ["some"],
    "log_every": [0],
    "checkpoint_every": [0],
    "checkpoint_minutes": [-1],
    "keep_checkpoints": [0],
    "keep_every": [0],
    "sample_every": [0],
    "unknown": [1],
}


@pytest.mark.parametrize("field", ALLOWED)
def test_values_up_to_the_bounds_are_taken(field):
    for value in ALLOWED[field]:
        assert getattr(Train(**{"steps": 500, field: value}), field) == value


@pytest.mark.parametrize("field", REFUSED)
def test_values_beyond_the_bounds_are_refused_by_field(field):
    for value in REFUSED[field]:
        with pytest.raises(ValidationError) as caught:
            Train.model_validate({"steps": 500, field: value})
        assert {error["loc"][0] for error in caught.value.errors() if error["loc"]} == {field}


def test_a_block_cannot_be_changed():
    with pytest.raises(ValidationError):
        Train(steps=3).steps = 4


def test_a_micro_batch_that_is_no_count_says_what_is():
    with pytest.raises(ValidationError, match=r"-2 is not allowed: a whole number of 1 or more, or auto"):
        Train.model_validate({"steps": 1, "micro_batch": -2})


def test_a_warm_up_is_shorter_than_the_stage():
    assert Train(steps=3, warmup_steps=2).warmup_steps == 2
    with pytest.raises(ValidationError, match=r"warmup_steps 3 must be less than steps 3"):
        Train.model_validate({"steps": 3, "warmup_steps": 3})


@pytest.mark.parametrize("value", [0.3, 0.999, "off", "selective", "full", "auto"])
def test_what_the_backward_may_recompute(value):
    for compiled in (True, "auto"):
        train = Train(steps=1, compile=compiled, gradient_checkpointing=value)
        assert (train.compile, train.gradient_checkpointing) == (compiled, value)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, -0.5, True, "half", "0.5", None])
def test_a_share_of_activations_is_between_0_and_1(value):
    with pytest.raises(ValidationError, match="off, selective, full, auto, or the share of activations"):
        Train.model_validate({"steps": 1, "compile": True, "gradient_checkpointing": value})
    with pytest.raises(ValidationError, match="is not allowed: true, false or auto"):
        Train.model_validate({"steps": 1, "compile": value if value is not True else 1})


def test_only_the_compiler_keeps_a_share():
    with pytest.raises(ValidationError, match=r"0\.3 needs compile: true or auto") as caught:
        Train.model_validate({"steps": 1, "gradient_checkpointing": 0.3})
    assert caught.value.errors()[0]["ctx"]["path"] == ("gradient_checkpointing",)


@pytest.mark.parametrize(
    ("fields", "wrong", "words"),
    [
        ({"batch_size": 2}, "steps_per_batch", "3 is more than the batch_size, 2"),
        ({"steps": 10}, "steps", "10 is no multiple of steps_per_batch, 3; the nearest are 9 or 12"),
        ({"steps": 2}, "steps", "2 is no multiple of steps_per_batch, 3; the nearest is 3"),
        ({"checkpoint_every": 4}, "checkpoint_every", "the nearest are 3 or 6"),
        ({"sample_every": 5}, "sample_every", "the nearest are 3 or 6"),
    ],
)
def test_batches_of_several_steps_are_whole(fields, wrong, words):
    good = {"steps": 9, "steps_per_batch": 3, "checkpoint_every": 6, "sample_every": None, "batch_size": 3}
    assert Train(**good).steps == 9
    assert Train(**{**good, "sample_every": 3}).sample_every == 3
    with pytest.raises(ValidationError) as caught:
        Train.model_validate({**good, **fields})
    (error,) = caught.value.errors()
    assert error["ctx"]["path"] == (wrong,)
    assert words in error["msg"]


def test_the_optimizer_has_every_setting_of_the_block():
    weight = torch.nn.Parameter(torch.ones(3))
    settings = Train(steps=1, learning_rate=0.25, betas=[0.5, 0.75], eps=1e-3, weight_decay=0.125)
    optimizer = optimizer_of(settings, iter([weight]))
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert group["params"][0] is weight
    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "fused", "amsgrad")}
    assert options == {
        "lr": 0.25,
        "betas": (0.5, 0.75),
        "eps": 1e-3,
        "weight_decay": 0.125,
        "fused": True,
        "amsgrad": False,
    }
    # AdamW's first step: w - lr wd w - lr g / (|g| + eps)
    weight.grad = torch.full((3,), 2.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.25 * 0.125 - 0.25 * 2 / 2.001))


def test_devices_without_a_fused_step_do_without():
    assert not optimizer_of(Train(steps=1), [torch.nn.Parameter(torch.ones(1, device="meta"))]).defaults[
        "fused"
    ]


def test_moments_in_8_bits_are_those_of_bitsandbytes(monkeypatch):
    made = []
    module = SimpleNamespace(AdamW8bit=lambda kept, **options: made.append((kept, options)) or "8 bits")
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=module))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    weight = torch.nn.Parameter(torch.ones(1))
    assert optimizer_of(Train(steps=1, optimizer="adamw8bit", learning_rate=0.5), [weight]) == "8 bits"
    options = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    assert made == [([weight], options)]


@pytest.mark.parametrize("there", [True, False])
def test_what_is_not_installed_is_said_of_what_needs_it_alone(monkeypatch, there):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name if there else None)
    assert problem("adamw") is None
    words = "bitsandbytes is not installed: pip install 'posttrain[8bit]'"
    assert problem("adamw8bit") == (None if there else words)
