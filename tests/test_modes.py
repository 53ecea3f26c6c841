"""A stage finds out how to compute where the recipe says auto: the fastest of what fits, tried once."""

import json
from types import SimpleNamespace

import pytest
import torch
from lines import descending, line_policy

from posttrain.algorithms.sft import SFT
from posttrain.engine import modes
from posttrain.engine.micro_batch import Trial
from posttrain.engine.modes import Found, Mode, fastest, in_words, settled
from posttrain.errors import TrainingError
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.policy.out_of_memory import OutOfMemory
from posttrain.stages import micro_batch as remembering
from posttrain.stages.micro_batch import remember, remember_modes, settled_mode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
AUTO = {"compile": "auto", "gradient_checkpointing": "auto", "micro_batch": "auto"}


@pytest.mark.parametrize(
    ("given", "on_cpu", "on_cuda"),
    [
        ({}, Mode(), Mode()),
        ({"compile": True}, Mode(True), Mode(True)),
        ({"gradient_checkpointing": "full"}, Mode(False, "full"), Mode(False, "full")),
        ({"compile": True, "gradient_checkpointing": 0.3}, Mode(True, 0.3), Mode(True, 0.3)),
        ({"compile": "auto"}, Mode(), None),
        ({"compile": "auto", "gradient_checkpointing": 0.3}, Mode(False, 0.3), None),
        ({"gradient_checkpointing": "auto"}, Mode(), None),
        ({"compile": True, "gradient_checkpointing": "auto"}, Mode(True), None),
        (AUTO, Mode(), None),
    ],
)
def test_on_a_cpu_auto_changes_nothing_and_on_cuda_it_is_tried(given, on_cpu, on_cuda):
    assert settled(Train(steps=1, **given), CPU) == on_cpu
    assert settled(Train(steps=1, **given), CUDA) == on_cuda


@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        (Mode(), ["off"]),
        (Mode(False, "selective"), ["selective"]),
        (Mode(False, 0.3), [0.3]),
        (Mode(True), ["off", ("compile", 1.0)]),
        (Mode(True, "full"), ["full", ("compile", 1.0)]),
        (Mode(True, "selective"), ["off", ("compile", 0.5)]),
        (Mode(True, 0.3), ["off", ("compile", 0.3)]),
    ],
    ids=str,
)
def test_blocks_keep_their_share_by_the_compiler_or_by_checkpointing(monkeypatch, mode, calls):
    made, reason, policy = [], None, line_policy()

    def compile_blocks(p, strategy, sample, kept):
        assert (p, strategy, sample, type(kept)) == (policy, "strategy", "sample", float)
        made.append(("compile", kept))
        return reason

    def checkpoint_blocks(transformer, checkpointing):
        assert transformer is policy.model.transformer
        made.append(checkpointing)

    monkeypatch.setattr(modes, "compile_blocks", compile_blocks)
    monkeypatch.setattr(modes, "checkpoint_blocks", checkpoint_blocks)
    monkeypatch.setattr(modes, "use_uncompiled", lambda p: made.append(("uncompiled", p is policy)))
    assert modes.enter(mode, policy, "strategy", "sample") is None
    assert made == calls
    made.clear()
    policy.compiled = True
    assert modes.enter(mode, policy, "strategy", "sample") is None
    assert made == [("uncompiled", True), *calls], "what was compiled before is undone first"
    made.clear()
    reason = "no compiler"
    assert modes.enter(mode, policy, "strategy", "sample") == (reason if mode.compiled else None)
    failed = [mode.checkpointing] if mode.compiled else []
    assert made == [("uncompiled", True), *calls, *failed], "what does not compile is checkpointed"


class Machine:
    """A device on which modes have given throughputs, in items a second; 0 does not fit, None does not
    compile. Each trial takes ``each`` seconds."""

    def __init__(self, monkeypatch, rates, each=1.0, sizes=None):
        self.rates, self.each, self.sizes = rates, each, sizes or {}
        self.now, self.entered, self.searched = 5000.0, [], []
        monkeypatch.setattr(modes, "enter", self.enter)
        monkeypatch.setattr(modes, "largest_micro_batch", self.search)
        monkeypatch.setattr(modes, "one_trial", self.one)

    def enter(self, mode, policy, strategy, sample):
        assert (policy, strategy, sample) == (self.policy, self.strategy, "sample")
        self.entered.append(mode)
        return "no compiler" if self.rates.get(mode, 1.0) is None else None

    def search(self, algorithm, settings, policy, strategy, sample, first, expired=None):
        self.expired = expired
        assert isinstance(algorithm, SFT)
        assert settings in (None, self.settings)
        assert (policy, strategy, sample) == (self.policy, self.strategy, "sample")
        mode = self.entered[-1]
        self.searched.append(first)
        self.now += self.each
        if not (rate := self.rates.get(mode, 1.0)):
            raise TrainingError(f"no room for {mode}")
        size = self.sizes.get(mode, 1)
        return size, [Trial(1, rate / 4, 0), Trial(size, rate, 0)]

    def one(self, algorithm, items, policy, strategy, sample):
        return self.search(algorithm, None, policy, strategy, sample, items)[1][-1]

    def fastest(self, steps=10_000, policy=None, compiles=True, **given):
        policy = policy or line_policy()
        strategy = descending(policy)
        strategy.compiles = compiles
        self.policy, self.strategy = policy, strategy
        self.settings = Train(steps=10_000, batch_size=8, **{**AUTO, **given})
        return fastest(SFT(), self.settings, policy, strategy, "sample", steps, lambda: self.now)


OFF, C_OFF, C_HALF, C_FIFTH, C_FULL = Mode(), *(Mode(True, c) for c in ("off", 0.5, 0.2, "full"))


def test_every_mode_is_tried_and_the_fastest_is_taken(monkeypatch):
    machine = Machine(
        monkeypatch,
        {OFF: 10.0, C_OFF: 30.0, C_HALF: 40.0, C_FIFTH: 20.0, C_FULL: 5.0},
        sizes={OFF: 4, C_OFF: 8, C_HALF: 32},
    )
    found = machine.fastest()
    assert [one.mode for one in found] == [C_HALF, C_OFF, C_FIFTH, OFF, C_FULL]
    assert (found[0].micro_batch, found[0].items_per_second) == (32, 40.0)
    assert machine.searched == [1, 4, 8, 32, 32], "each begins where the one before ended"
    assert machine.entered == [OFF, C_OFF, C_HALF, C_FIFTH, C_FULL, C_HALF], (
        "and the blocks end in the fastest"
    )


def test_the_mode_that_came_last_is_not_entered_again(monkeypatch):
    machine = Machine(monkeypatch, {OFF: 10.0, C_FULL: 50.0})
    assert machine.fastest()[0].mode == C_FULL
    assert machine.entered[-1] == C_FULL
    assert len(machine.entered) == 5


@pytest.mark.parametrize(("seconds", "compiles"), [(599, False), (600, True)])
def test_a_short_stage_is_not_compiled(monkeypatch, seconds, compiles):
    machine = Machine(monkeypatch, {OFF: 80.0, C_OFF: 160.0})
    found = machine.fastest(steps=seconds * 10)  # 8 items a step, at 80 a second
    assert (found[0].mode == C_OFF) == compiles
    assert len(found) == (5 if compiles else 1)


def test_what_the_recipe_says_is_not_tried_otherwise(monkeypatch):
    machine = Machine(monkeypatch, {})
    assert [one.mode for one in machine.fastest(compile=False)] == [OFF]
    machine.entered.clear()
    machine.fastest(gradient_checkpointing="full")
    assert machine.entered[:2] == [Mode(False, "full"), C_FULL]
    machine.entered.clear()
    machine.fastest(compile=True)
    assert machine.entered[:4] == [C_OFF, C_HALF, C_FIFTH, C_FULL]
    machine.searched.clear()
    found = machine.fastest(micro_batch=3)
    assert set(machine.searched) == {3}
    assert {one.micro_batch for one in found} == {3}
    machine.entered.clear()
    machine.fastest(compiles=False)
    assert machine.entered == [OFF], "a strategy that cannot compile does not"


@pytest.mark.parametrize(
    ("each", "tried"), [(20.0, 5), (25.0, 5), (25.1, 4), (50.0, 3), (51.0, 2), (200.0, 1)]
)
def test_trying_ends_after_a_hundred_seconds(monkeypatch, each, tried):
    machine = Machine(monkeypatch, {}, each=each)
    assert len(machine.fastest()) == tried
    assert modes.PATIENCE == 100


def test_no_further_size_is_tried_after_a_hundred_seconds(monkeypatch):
    machine = Machine(monkeypatch, {}, each=0.0)
    machine.fastest()
    machine.now += 100
    assert not machine.expired()
    machine.now += 0.1
    assert machine.expired()


def test_a_small_device_computes_again_what_it_cannot_keep(monkeypatch):
    selective, full = Mode(False, "selective"), Mode(False, "full")
    machine = Machine(monkeypatch, {OFF: 0, selective: 0, C_OFF: 0, C_HALF: 0, C_FIFTH: 9.0})
    found = machine.fastest()
    assert [one.mode for one in found] == [C_FIFTH, full, C_FULL]
    machine = Machine(monkeypatch, dict.fromkeys([OFF, selective, full], 0))
    with pytest.raises(TrainingError, match="no room for not compiled, gradient_checkpointing full"):
        machine.fastest(compile=False)


def test_where_nothing_compiles_the_blocks_run_as_they_are(monkeypatch):
    machine = Machine(monkeypatch, dict.fromkeys([C_OFF, C_HALF, C_FIFTH, C_FULL]))
    assert [one.mode for one in machine.fastest()] == [OFF]
    assert machine.entered[-1] == OFF
    assert machine.searched == [1], "and are not timed in a mode that they are not in"
    assert [one.mode for one in machine.fastest(compile=True)] == [OFF]


def test_a_strategy_that_cannot_go_on_ends_the_search(monkeypatch):
    machine = Machine(monkeypatch, {})

    def search(*_):
        raise OutOfMemory(torch.OutOfMemoryError("CUDA out of memory"), 4, 2)

    monkeypatch.setattr(modes, "largest_micro_batch", search)
    with pytest.raises(OutOfMemory):
        machine.fastest()


def test_what_was_found_in_a_line():
    found = [Found(C_HALF, 8, [Trial(4, 20.0, 5), Trial(8, 41.5, 9)]), Found(OFF, 2, [Trial(2, 11.0, 3)])]
    assert in_words(found, CPU) == (
        "chosen by trying: compiled, gradient_checkpointing 0.5, micro_batch 8 (4: 20/s, 8: 41.5/s); "
        "slower were not compiled, gradient_checkpointing off: 11/s with 2"
    )
    assert in_words(found[1:], CPU).endswith("off, micro_batch 2 (2: 11/s)")


FOUND = [Found(C_HALF, 8, [Trial(8, 41.5, 9)]), Found(OFF, 2, [Trial(2, 11.0, 3)])]
RECIPE = SimpleNamespace(device="cpu", parallel=Single())


def auto(**given):
    return SimpleNamespace(train=Train(steps=4, **{**AUTO, **given}))


def on_cuda(monkeypatch):
    monkeypatch.setattr(remembering.modes, "settled", lambda settings, device: settled(settings, CUDA))


def test_what_was_found_is_remembered_for_these_settings(tmp_path, monkeypatch):
    on_cuda(monkeypatch)
    assert settled_mode(RECIPE, auto(), tmp_path, 1) is None
    remember_modes(RECIPE, auto(), tmp_path, 1, FOUND)
    assert settled_mode(RECIPE, auto(), tmp_path, 1) == C_HALF
    assert remembering.settled(RECIPE, auto(), tmp_path, 1) == 8
    assert settled_mode(RECIPE, auto(), tmp_path, 2) is None, "with other processes"
    assert settled_mode(RECIPE, auto(compile=False), tmp_path, 1) is None, "with another recipe"
    assert settled_mode(RECIPE, auto(micro_batch=4), tmp_path, 1) is None
    assert settled_mode(RECIPE, SimpleNamespace(train=Train(steps=1)), tmp_path, 1) == OFF
    remember(RECIPE, tmp_path, 1, 4)  # after it ran out of memory
    assert settled_mode(RECIPE, auto(), tmp_path, 1) == C_HALF
    assert remembering.settled(RECIPE, auto(), tmp_path, 1) == 4


def test_modes_are_written_in_their_order_with_what_the_recipe_said(tmp_path):
    remember_modes(RECIPE, auto(compile=True), tmp_path, 3, FOUND)
    given = [True, "auto", "auto"]
    content = {
        "device": "cpu",
        "parallel": {"strategy": "single"},
        "processes": 3,
        "micro_batch": 8,
        "modes": [
            {
                "compiled": True,
                "checkpointing": 0.5,
                "given": given,
                "micro_batch": 8,
                "trials": [{"items": 8, "items_per_second": 41.5, "bytes": 9}],
            },
            {
                "compiled": False,
                "checkpointing": "off",
                "given": given,
                "micro_batch": 2,
                "trials": [{"items": 2, "items_per_second": 11.0, "bytes": 3}],
            },
        ],
    }
    file = tmp_path / "micro_batch.json"
    assert json.loads(file.read_text()) == content
    remember(RECIPE, tmp_path, 3, 4)
    assert json.loads(file.read_text()) == {**content, "micro_batch": 4}
    remember(RECIPE, tmp_path, 2, 4)
    assert "modes" not in json.loads(file.read_text()), "those of other processes do not stay"


@pytest.mark.parametrize("damage", [None, [], [3], [{}], {"0": 1}, [{"given": ["auto", "auto", "auto"]}]])
def test_a_damaged_memory_of_the_modes_is_tried_again(tmp_path, monkeypatch, damage):
    on_cuda(monkeypatch)
    remember_modes(RECIPE, auto(), tmp_path, 1, FOUND)
    file = tmp_path / "micro_batch.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "modes": damage}))
    assert settled_mode(RECIPE, auto(), tmp_path, 1) is None
