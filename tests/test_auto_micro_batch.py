"""``auto`` finds how many items fit and pay, and whether to compile, once, and leaves nothing behind."""

import json

import pytest
import torch
from pipelines import load
from runs import TRAIN, recipe, run_quietly, stage
from small_memory import no_room_for, remembered
from test_run import assert_equal_weights, weights

from posttrain.engine import compiling, micro_batch, modes, trial
from posttrain.engine.modes import settled
from posttrain.errors import RecipeError, TrainingError

AUTO = TRAIN.replace("micro_batch: 4", "micro_batch: auto").replace("batch_size: 4", "batch_size: 8")


def test_auto_finds_a_number_once_and_the_trials_leave_nothing_behind(tmp_path, monkeypatch):
    printed = run_quietly(recipe(stage("sft", train=AUTO)), tmp_path / "auto")
    number = remembered(tmp_path / "auto")
    assert f"micro_batch auto is {number}" in printed
    same = AUTO.replace("micro_batch: auto", f"micro_batch: {number}")
    run_quietly(recipe(stage("sft", train=same)), tmp_path / "given")
    assert_equal_weights(weights(tmp_path / "auto" / "sft"), weights(tmp_path / "given" / "sft"))
    bills = [json.loads((tmp_path / n / "sft" / "stage.json").read_text()) for n in ("auto", "given")]
    assert bills[0]["forward_equivalents"] == bills[1]["forward_equivalents"]
    monkeypatch.setattr(trial, "timed", lambda *_: pytest.fail("it was found before"))
    (tmp_path / "auto" / "sft" / "stage.json").unlink()
    run_quietly(recipe(stage("sft", train=AUTO)), tmp_path / "auto")


def faster_and_larger(monkeypatch, each=1000, fastest=64):
    """Let a trial of n rows take each * n bytes, and rows be the faster, the more of them, up to ``fastest``."""

    def timed(policy, strategy, sample, rows):
        trial.try_out(policy, strategy, sample, rows)
        return rows / min(rows, fastest), each * rows

    monkeypatch.setattr(trial, "timed", timed)


@pytest.mark.parametrize(
    ("room", "fastest", "batch", "number"),
    [
        (None, 64, 32, 32),  # no more than a step has
        (None, 64, 24, 16),
        (None, 4, 32, 4),  # more would only cost memory
        (9_000, 64, 32, 8),  # 16 rows would need 16 kB, where the optimizer has taken its part
        (17_800, 64, 32, 16),
    ],
)
def test_auto_takes_no_more_than_fits_and_pays(tmp_path, monkeypatch, room, fastest, batch, number):
    faster_and_larger(monkeypatch, fastest=fastest)
    moments = 8 * sum(p.numel() for p in load().transformer.parameters())
    available = None if room is None else (room + moments) / micro_batch.FILLED
    monkeypatch.setattr(micro_batch, "available_memory", lambda device: available)
    train = AUTO.replace("batch_size: 8", f"batch_size: {batch}").replace("steps: 6", "steps: 2")
    run_quietly(recipe(stage("sft", train=train)), tmp_path / "run")
    assert remembered(tmp_path / "run") == number


def test_auto_stays_below_what_ran_out_of_memory(tmp_path, monkeypatch):
    faster_and_larger(monkeypatch)
    no_room_for(4, monkeypatch)
    run_quietly(recipe(stage("sft", train=AUTO)), tmp_path / "run")
    assert remembered(tmp_path / "run") == 2


@pytest.mark.parametrize("block", ["{strategy: auto}", "{strategy: fsdp2}"])
def test_auto_says_what_is_missing_where_one_does_not_fit(tmp_path, monkeypatch, block):
    no_room_for(1, monkeypatch)
    with pytest.raises(TrainingError, match=r"out of memory with one item at a time .*posttrain plan"):
        run_quietly(recipe(stage("sft", train=AUTO), overrides=[f"parallel={block}"]), tmp_path / "run")


def test_auto_where_the_strategy_cannot_go_on_ends_and_remembers_what_fitted(tmp_path, monkeypatch):
    made = recipe(stage("sft", train=AUTO), overrides=["parallel={strategy: fsdp2}"])
    faster_and_larger(monkeypatch)
    no_room_for(4, monkeypatch)
    with pytest.raises(TrainingError, match=r"sft: out of memory with 4 .* last checkpoint with 2"):
        run_quietly(made, tmp_path / "run")
    run_quietly(made, tmp_path / "run")
    assert remembered(tmp_path / "run") == 2


@pytest.mark.parametrize("value", ["0", "-1", "Auto", "1.5", "'8'", "true"])
def test_a_micro_batch_that_is_no_number_has_one_error(value):
    with pytest.raises(RecipeError) as found:
        recipe(stage("sft", train=TRAIN.replace("micro_batch: 4", f"micro_batch: {value}")))
    assert str(found.value).count("micro_batch") == 1
    assert "a whole number of 1 or more, or auto" in str(found.value)


def test_a_run_finds_its_mode_once(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": "aot_eager"})
    monkeypatch.setattr(modes, "settled", lambda settings, device: settled(settings, torch.device("cuda")))
    monkeypatch.setattr(modes, "WORTHWHILE", 0)
    monkeypatch.setattr(trial, "timed", lambda policy, strategy, sample, rows: (2.0 - policy.compiled, rows))
    train = TRAIN.replace("micro_batch: 4", "micro_batch: auto, compile: auto")
    printed = run_quietly(recipe(stage("sft", train=train)), tmp_path / "run")
    line = "sft: chosen by trying: compiled, gradient_checkpointing off, micro_batch"
    assert sum(line in printed_line for printed_line in printed.splitlines()) == 1
    monkeypatch.setattr(trial, "timed", lambda *_: pytest.fail("it was found before"))
    (tmp_path / "run" / "sft" / "stage.json").unlink()
    again = run_quietly(recipe(stage("sft", train=train)), tmp_path / "run")
    assert "chosen by trying" not in again


def test_a_search_that_ended_the_run_goes_on_with_the_size_that_fitted(tmp_path, monkeypatch):
    monkeypatch.setattr(modes, "settled", lambda settings, device: settled(settings, torch.device("cuda")))
    faster_and_larger(monkeypatch)
    no_room_for(4, monkeypatch)
    train = AUTO.replace("{", "{gradient_checkpointing: auto, ")
    made = recipe(stage("sft", train=train), overrides=["parallel={strategy: fsdp2}"])
    with pytest.raises(TrainingError, match=r"sft: out of memory with 4 .* last checkpoint with 2"):
        run_quietly(made, tmp_path / "run")
    printed = run_quietly(made, tmp_path / "run")
    assert "chosen by trying: not compiled, gradient_checkpointing off, micro_batch 2" in printed


def test_a_search_says_why_nothing_is_compiled(tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(compiling, "OPTIONS", {**compiling.OPTIONS, "backend": broken})
    monkeypatch.setattr(modes, "settled", lambda settings, device: settled(settings, torch.device("cuda")))
    monkeypatch.setattr(trial, "timed", lambda policy, strategy, sample, rows: (1.0, rows))
    train = TRAIN.replace("micro_batch: 4", "micro_batch: auto, compile: true")
    printed = run_quietly(recipe(stage("sft", train=train)), tmp_path / "run")
    (line,) = [line for line in printed.splitlines() if "compile:" in line]
    assert line.startswith("sft: compile: the blocks run as they are (")
    assert "no kernel" in line
