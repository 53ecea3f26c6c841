"""A stage finds out how to compute where the recipe says auto: the fastest of what fits, tried once."""

import gc
import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from lines import descending, line_policy

from posttrain.algorithms.sft import SFT
from posttrain.engine import modes
from posttrain.engine.micro_batch import Size, Trial
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
        ({"compile": True, "micro_batch": "auto"}, Mode(True), None),
        ({"micro_batch": "auto"}, Mode(), Mode()),
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
    made, reason, policy, expected_rows = [], None, line_policy(), 1

    def compile_blocks(p, strategy, sample, kept, rows):
        assert (p, strategy, sample, type(kept)) == (policy, "strategy", "sample", float)
        made.append(("compile", kept))
        assert rows == expected_rows
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
    policy.compiled, expected_rows = True, 6
    assert modes.enter(mode, policy, "strategy", "sample", 6) is None
    assert made == [("uncompiled", True), *calls], "what was compiled before is undone first"
    made.clear()
    reason, expected_rows = "no compiler", 1
    assert modes.enter(mode, policy, "strategy", "sample") == (reason if mode.compiled else None)
    failed = [mode.checkpointing] if mode.compiled else []
    assert made == [("uncompiled", True), *calls, *failed], "what does not compile is checkpointed"


class Machine:
    """A device on which modes have given throughputs, in items a second; 0 does not fit, None does not
    compile. Each trial takes ``each`` seconds. ``sizes`` fit of a mode, or of any number if it has none. The
    modes ``crowding`` do not fit even while they are compiled."""

    def __init__(self, monkeypatch, rates, each=1.0, sizes=None, crowding=()):
        self.rates, self.each, self.sizes, self.crowding = rates, each, sizes or {}, crowding
        self.now, self.entered, self.searched, self.rows = 5000.0, [], [], []
        monkeypatch.setattr(modes, "enter", self.enter)
        monkeypatch.setattr(modes, "largest_micro_batch", self.search)
        monkeypatch.setattr(modes, "one_trial", self.one)
        monkeypatch.setattr(modes, "rehearse", self.calls)

    def calls(self, algorithm, rule):
        assert isinstance(algorithm, SFT)
        return SimpleNamespace(rows_with=3)

    def enter(self, mode, policy, strategy, sample, rows):
        assert (policy, strategy, sample) == (self.policy, self.strategy, "sample")
        self.entered.append(mode)
        self.rows.append(rows)
        if mode in self.crowding:
            raise TrainingError(f"no room to compile {mode}")
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
        size = self.sizes.get(mode, first)
        return Size(size, [Trial(1, rate / 4, 0), Trial(size, rate, 0)], mode in self.sizes)

    def one(self, algorithm, items, policy, strategy, sample):
        return self.search(algorithm, None, policy, strategy, sample, items).trials[-1]

    def fastest(self, steps=10_000, policy=None, compiles=True, alone=True, **given):
        policy = policy or line_policy()
        strategy = descending(policy)
        strategy.compiles, strategy.tries_alone = compiles, alone
        self.policy, self.strategy = policy, strategy
        self.settings = Train(steps=10_000, batch_size=8, **{**AUTO, **given})
        self.told = []
        now = lambda: self.now  # noqa: E731
        return fastest(SFT(), self.settings, policy, strategy, "sample", steps, now, self.told.append)


OFF, C_OFF, C_HALF, C_FIFTH, C_FULL = Mode(), *(Mode(True, c) for c in ("off", 0.5, 0.2, "full"))
CROWDED = {OFF: 4, C_OFF: 8, C_HALF: 16, C_FIFTH: 32, C_FULL: 64}
RISING = {OFF: 10.0, C_OFF: 30.0, C_HALF: 40.0, C_FIFTH: 50.0, C_FULL: 60.0}


def test_more_is_recomputed_as_long_as_that_is_faster_and_the_fastest_is_taken(monkeypatch):
    machine = Machine(monkeypatch, {**RISING, C_FIFTH: 20.0}, sizes=CROWDED)
    found = machine.fastest()
    assert [one.mode for one in found] == [C_HALF, C_OFF, C_FIFTH, OFF]
    assert (found[0].micro_batch, found[0].items_per_second) == (16, 40.0)
    assert machine.searched == [1, 4, 16, 32], "each begins with twice what the one before could hold"
    assert machine.entered == [OFF, C_OFF, C_HALF, C_FIFTH, C_HALF], "and the blocks end in the fastest"
    assert machine.rows == [3, 12, 48, 96, 48], "compiled for the rows that are tried or taken"


def test_the_search_ends_with_the_first_mode_that_is_slower(monkeypatch):
    machine = Machine(monkeypatch, {**RISING, C_HALF: 29.0}, sizes=CROWDED)
    assert [one.mode for one in machine.fastest()] == [C_OFF, C_HALF, OFF]


def test_equally_fast_modes_do_not_end_the_search(monkeypatch):
    machine = Machine(monkeypatch, dict.fromkeys(RISING, 20.0), sizes=CROWDED)
    assert len(machine.fastest()) == 5


def test_a_mode_that_memory_did_not_limit_is_the_last(monkeypatch):
    machine = Machine(monkeypatch, RISING, sizes={OFF: 4, C_OFF: 8})
    assert machine.fastest()[0].mode == C_HALF
    assert machine.entered == [OFF, C_OFF, C_HALF], "recomputing more can only be slower"


def test_the_mode_that_came_last_is_not_entered_again(monkeypatch):
    machine = Machine(monkeypatch, RISING, sizes=CROWDED)
    assert machine.fastest()[0].mode == C_FULL
    assert machine.entered == [OFF, C_OFF, C_HALF, C_FIFTH, C_FULL]


@pytest.mark.parametrize(("seconds", "compiles"), [(599, False), (600, True)])
def test_a_short_stage_is_not_compiled(monkeypatch, seconds, compiles):
    machine = Machine(monkeypatch, {OFF: 80.0, C_OFF: 160.0})
    found = machine.fastest(steps=seconds * 10)  # 8 items a step, at 80 a second
    assert (found[0].mode == C_OFF) == compiles
    assert len(found) == (2 if compiles else 1)


def test_what_the_recipe_says_is_not_tried_otherwise(monkeypatch):
    machine = Machine(monkeypatch, RISING, sizes=CROWDED)
    assert [one.mode for one in machine.fastest(compile=False)] == [OFF]
    machine.entered.clear()
    machine.fastest(gradient_checkpointing="full")
    assert machine.entered == [Mode(False, "full"), C_FULL]
    for record in (machine.searched, machine.rows, machine.entered):
        record.clear()
    found = machine.fastest(micro_batch=3)
    assert (set(machine.searched), set(machine.rows)) == ({3}, {9})
    assert {one.micro_batch for one in found} == {3}
    assert machine.entered == [OFF, C_OFF], "with a given size, recomputing can only be slower"
    machine.entered.clear()
    machine.fastest(compiles=False)
    assert machine.entered == [OFF], "a strategy that cannot compile does not"


def test_compile_true_finds_its_first_size_uncompiled_and_does_not_take_it(monkeypatch):
    machine = Machine(monkeypatch, {**RISING, OFF: 1000.0}, sizes=CROWDED)
    found = machine.fastest(compile=True, steps=1)
    assert [one.mode for one in found] == [C_FULL, C_FIFTH, C_HALF, C_OFF]
    assert machine.searched[:2] == [1, 4]


@pytest.mark.parametrize(
    ("each", "tried"), [(10.0, 5), (24.0, 5), (24.1, 4), (30.0, 4), (40.0, 3), (60.0, 2), (61.0, 1)]
)
def test_no_trial_begins_that_would_end_after_two_minutes(monkeypatch, each, tried):
    machine = Machine(monkeypatch, RISING, each=each, sizes=CROWDED)
    assert len(machine.fastest()) == tried
    assert modes.PATIENCE == 120


def test_a_trial_is_expected_to_take_as_long_as_the_longest(monkeypatch):
    machine = Machine(monkeypatch, {}, each=0.0)
    machine.fastest()
    for passed, expired in (*[(20.0, False)] * 5, (0.1, True)):
        machine.now += passed
        assert machine.expired() == expired, "20 s are expected before one took longer"
    machine = Machine(monkeypatch, {}, each=0.0)
    machine.fastest()
    for passed, expired in ((50.0, False), (20.0, False), (0.1, True)):
        machine.now += passed
        assert machine.expired() == expired, "50 + 50, 70 + 50, 70.1 + 50"


def test_a_small_device_computes_again_what_it_cannot_keep(monkeypatch):
    selective, full = Mode(False, "selective"), Mode(False, "full")
    machine = Machine(
        monkeypatch, {OFF: 0, selective: 0, C_OFF: 0, C_HALF: 0, C_FIFTH: 9.0}, sizes={C_FIFTH: 1}
    )
    found = machine.fastest()
    assert [one.mode for one in found] == [C_FIFTH, full, C_FULL]
    assert machine.searched == [1, 1, 1, 1, 1, 1, 2]
    machine = Machine(
        monkeypatch, {OFF: 0, selective: 0, full: 0, C_FULL: 5.0, C_FIFTH: 0, C_HALF: 0, C_OFF: 0}
    )
    assert [one.mode for one in machine.fastest()] == [C_FULL], "which takes less than uncompiled blocks"
    assert set(machine.searched) == {1}
    machine = Machine(monkeypatch, dict.fromkeys([OFF, selective, full], 0))
    with pytest.raises(TrainingError, match="no room for not compiled, gradient_checkpointing full"):
        machine.fastest(compile=False)


def test_where_nothing_compiles_the_blocks_run_as_they_are(monkeypatch):
    machine = Machine(monkeypatch, dict.fromkeys([C_OFF, C_HALF, C_FIFTH, C_FULL]))
    assert [one.mode for one in machine.fastest()] == [OFF]
    assert machine.entered == [OFF, C_OFF, OFF], "what fails to compile once is not tried otherwise"
    assert machine.searched == [1], "and is not timed in a mode that it is not in"
    assert machine.told == ["no compiler"]
    assert [one.mode for one in machine.fastest(compile=True)] == [OFF]
    assert machine.told == ["no compiler"]


def test_it_is_told_why_nothing_is_compiled_though_the_recipe_says_so(monkeypatch):
    machine = Machine(monkeypatch, {OFF: 9.0, C_OFF: 0, C_HALF: 0, C_FIFTH: 0, C_FULL: 0})
    assert [one.mode for one in machine.fastest(compile=True)] == [OFF]
    assert machine.told == [f"no room for {C_FULL}"]
    assert [one.mode for one in machine.fastest()] == [OFF]
    assert machine.told == [], "auto may find that nothing compiled fits"
    machine = Machine(monkeypatch, {OFF: 0}, each=51.0)
    assert machine.fastest(compile=True)[0].mode == Mode(False, "selective")
    assert machine.told == ["no time is left of the 120 s in which modes are tried"]
    machine = Machine(monkeypatch, {C_OFF: 0})
    assert machine.fastest(compile=True)[0].mode == C_HALF
    assert machine.told == []


def test_a_mode_that_did_not_fit_leaves_no_tensor_of_its_forward(monkeypatch):
    machine, kept = Machine(monkeypatch, {}), []

    def search(*arguments):
        if machine.entered[-1] == OFF:
            activation = torch.ones(3)
            kept.append(weakref.ref(activation))
            raise TrainingError("no room") from torch.OutOfMemoryError("CUDA out of memory")
        assert kept[0]() is None, "else the next mode has less room"
        return Size(1, [Trial(1, 1.0, 0)], False)

    monkeypatch.setattr(modes, "largest_micro_batch", search)
    gc.disable()  # when it comes by itself depends on all else
    try:
        assert machine.fastest(compile=False)[0].mode == Mode(False, "selective")
    finally:
        gc.enable()


def test_after_a_mode_that_did_not_fit_while_it_was_compiled_the_blocks_enter_the_one_that_is_taken(
    monkeypatch,
):
    selective = Mode(False, "selective")
    machine = Machine(monkeypatch, {}, crowding={Mode(True, "selective")})
    assert [one.mode for one in machine.fastest(gradient_checkpointing="selective")] == [selective]
    assert machine.entered == [selective, Mode(True, "selective"), selective]
    machine = Machine(monkeypatch, {OFF: 5.0, C_HALF: 9.0}, crowding={C_OFF})
    assert machine.fastest()[0].mode == C_HALF, "others are tried, as another one may fit"


def test_a_strategy_that_cannot_go_on_ends_the_search(monkeypatch):
    machine = Machine(monkeypatch, {})

    def search(*_):
        raise OutOfMemory(torch.OutOfMemoryError("CUDA out of memory"), 4, 2)

    monkeypatch.setattr(modes, "largest_micro_batch", search)
    with pytest.raises(OutOfMemory):
        machine.fastest(alone=False)
    machine = Machine(monkeypatch, {OFF: 0})
    with pytest.raises(TrainingError, match=r"^no room for not compiled, gradient_checkpointing off$"):
        machine.fastest(alone=False)
    assert machine.entered == [OFF], "weights may still be gathered"


def test_what_was_found_in_a_line():
    trials = [Trial(4, 20.0, 5), Trial(8, 41.5, 9)]
    found = [Found(C_HALF, 8, trials, False), Found(OFF, 2, [Trial(2, 11.0, 3)], True)]
    assert in_words(found, CPU) == (
        "chosen by trying: compiled, gradient_checkpointing 0.5, micro_batch 8 (4: 20/s, 8: 41.5/s); "
        "slower were not compiled, gradient_checkpointing off: 11/s with 2"
    )
    assert in_words(found[1:], CPU).endswith("off, micro_batch 2 (2: 11/s)")


FOUND = [Found(C_HALF, 8, [Trial(8, 41.5, 9)], True), Found(OFF, 2, [Trial(2, 11.0, 3)], False)]
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
    remembering.set_damaged_aside(tmp_path, pytest.fail)
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
