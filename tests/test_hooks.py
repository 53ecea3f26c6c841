"""Tests how a stage's hooks are called around its steps, and what time counts as training."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from ranks import on_ranks
from runs import EVALUATION, TRAIN, recipe, run_quietly, stage

from posttrain.distributed import world as worlds
from posttrain.distributed.world import ALONE
from posttrain.engine.checkpoint import load
from posttrain.engine.checkpoint_folder import saved
from posttrain.errors import StepRefused, TrainingError
from posttrain.stages import account as accounts
from posttrain.stages import watch as watches
from posttrain.stages.account import Account, Clock
from posttrain.stages.hooks import checkpoints as checkpoint_hook
from posttrain.stages.hooks.checkpoints import Checkpoints
from posttrain.stages.hooks.held_out import HeldOut
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.hooks.records import Records
from posttrain.stages.hooks.refused_steps import RefusedSteps
from posttrain.stages.hooks.smaller_micro_batch import SmallerMicroBatch
from posttrain.stages.hooks.totals import Totals
from posttrain.stages.watch import StageWatch
from posttrain.support.stopping import Stopped


class Noted(Hook):
    """Notes each call, and ends the stage at step ``ends``."""

    def __init__(self, name, calls, ends=None):
        self.name, self.calls, self.ends = name, calls, ends

    def between_batches(self, step, *, last):
        self.calls.append((self.name, step, last))
        return step != self.ends

    def after_step(self, step, samples, metrics):
        self.calls.append((self.name, step, samples, metrics))

    def refused(self, step, error):
        self.calls.append((self.name, step, error))


def watch_of(monkeypatch, account, *hooks):
    monkeypatch.setattr(watches, "hooks_of", lambda *arguments: list(hooks))
    stage = SimpleNamespace(name="s", train=SimpleNamespace(steps=6))
    run, policy = SimpleNamespace(stage=stage, world=ALONE), SimpleNamespace(forward_equivalents=0)
    training: Any = SimpleNamespace(account=account, run=run, policy=policy, start=0)
    unused: Any = None
    return StageWatch(training, None, unused, unused)


def test_hooks_are_called_in_order_at_each_moment(monkeypatch):
    calls = []
    watch = watch_of(monkeypatch, Account(), Noted("a", calls), Hook(), Noted("b", calls))
    assert watch.before_batch(4) is True
    watch.after_step(5, 2, {})
    watch.refused(6, error := StepRefused("loss nan"))
    watch.finish()
    assert calls == [
        ("a", 4, False),
        ("b", 4, False),
        ("a", 5, 2, {}),
        ("b", 5, 2, {}),
        ("a", 6, error),
        ("b", 6, error),
        ("a", 6, True),
        ("b", 6, True),
    ]


def test_a_hook_ends_the_stage_and_no_later_hook_is_called(monkeypatch):
    calls, account = [], Account()
    watch = watch_of(monkeypatch, account, Noted("a", calls, ends=2), Noted("b", calls))
    assert watch.before_batch(0) is True
    assert watch.before_batch(2) is False
    watch.finish()
    assert calls == [("a", 0, False), ("b", 0, False), ("a", 2, False)]
    assert account.ended_at == 2


def test_a_rollback_keeps_the_step_that_it_went_back_to(monkeypatch):
    account = Account()

    class RollsBack(Hook):
        def between_batches(self, step, *, last):
            account.replace_by({"samples": 3, "ended_at": 1})
            return False

    assert watch_of(monkeypatch, account, RollsBack()).before_batch(4) is False
    assert (account.ended_at, account.samples) == (1, 3)


def test_an_account_takes_over_what_a_checkpoint_kept_and_forgets_the_rest():
    account = Account(samples=9, pending=[1.0], read_at=4)
    same = account
    account.replace_by({"samples": 2, "alarms": ["late"]})
    assert same == Account(samples=2, alarms=["late"])
    with pytest.raises(TypeError, match="other"):
        account.replace_by({"other": 1})


def test_only_the_time_outside_pauses_is_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now[0])
    account = Account(samples=10, seconds=50.0)
    clock = Clock(account)
    now[0] += 4
    account.samples += 6
    with clock.paused():
        now[0] += 1000
    now[0] += 2
    with clock.paused():
        assert account.seconds == 56
        assert clock.images_per_second() == 1.0  # 6 samples in the 6 seconds since the clock was made


def test_totals_count_samples_and_the_steps_that_were_taken():
    account = Account()
    totals = Totals(account)
    totals.after_step(1, 8, {"loss": torch.zeros(())})
    totals.after_step(2, 4, {"skipped_steps": torch.ones(())})
    assert (account.samples, account.updates) == (12, 1)


class Told:
    """A stage's run that notes its warnings."""

    def __init__(self, folder, limit):
        self.folder, self.world, self.warnings = folder, ALONE, []
        self.stage = SimpleNamespace(name="nft", train=SimpleNamespace(stop_after_refused=limit))

    def warn(self, text):
        self.warnings.append(text)


def test_refused_steps_are_told_and_a_step_that_is_taken_begins_the_count_anew(tmp_path):
    run, account = Told(tmp_path, 2), Account()
    hook = RefusedSteps(cast(Any, SimpleNamespace(run=run, account=account)))
    hook.refused(3, StepRefused("loss nan", [{"sample": 7, "loss": math.nan}]))
    hook.after_step(4, 1, {})
    assert (account.refused, account.refused_in_a_row) == (1, 0)
    hook.refused(5, StepRefused("loss inf", [{"sample": 1, "loss": math.inf}]))
    words = "nft, step 5: loss inf is not finite; the step was not taken (1 in a row of 2)"
    assert run.warnings[1:] == [words]
    assert not list(tmp_path.iterdir())
    with pytest.raises(TrainingError, match=r"^nft, step 6: .*as were 2 in a row.*refused_steps\.jsonl"):
        hook.refused(6, StepRefused("a reward (no)", [{"sample": 2, "reason": "no"}]))
    rows = [json.loads(line) for line in (tmp_path / "refused_steps.jsonl").read_text("utf-8").splitlines()]
    assert rows == [{"step": 5, "sample": 1, "loss": "inf"}, {"step": 6, "sample": 2, "reason": "no"}]
    assert (account.refused, account.refused_in_a_row) == (3, 2)


def test_a_count_in_a_row_goes_on_where_a_checkpoint_left_it(tmp_path):
    account = Account()
    account.replace_by({"refused": 9, "refused_in_a_row": 1})
    hook = RefusedSteps(cast(Any, SimpleNamespace(run=Told(tmp_path, 2), account=account)))
    with pytest.raises(TrainingError, match="2 in a row"):
        hook.refused(6, StepRefused("a reward"))


def test_a_micro_batch_is_remembered_once_it_is_smaller(tmp_path):
    parallel = SimpleNamespace(model_dump=lambda mode: {})
    recipe, world = SimpleNamespace(device="cpu", parallel=parallel), SimpleNamespace(size=1)
    policy = SimpleNamespace(micro_batch=8)
    run = SimpleNamespace(recipe=recipe, folder=tmp_path, world=world)
    training: Any = SimpleNamespace(run=run, policy=policy)
    hook = SmallerMicroBatch(training)
    file = tmp_path / "micro_batch.json"
    hook.after_step(1, 1, {})
    assert not file.exists()
    policy.micro_batch = 4
    hook.after_step(2, 1, {})
    assert '"micro_batch": 4' in file.read_text()
    file.unlink()
    hook.after_step(3, 1, {})
    assert not file.exists(), "it did not change again"


def test_the_best_reading_after_the_first_step_is_kept(tmp_path, monkeypatch):
    train = TRAIN.replace("{steps: 6, ", "{steps: 6, keep_checkpoints: 1, keep_best: shapes, ")
    train = train.replace("checkpoint_every: 2", "checkpoint_every: 6")
    scores = iter([0.9, 0.1, math.nan, 0.7, 0.7, 0.5, 0.2])  # of steps 0 to 6
    monkeypatch.setattr(HeldOut, "_scored", lambda self: [{"scores": {"shapes": next(scores)}}])
    made = recipe(stage("sft", train=train, monitor="{every: 1, prompts: 2}"), evaluation=EVALUATION)
    run_quietly(made, tmp_path / "run")
    kept = saved(tmp_path / "run" / "sft" / "checkpoints")
    assert [path.name for path in kept] == ["step-00000003", "step-00000006"]
    account = load(kept[1]).extra
    assert (account["best"], account["best_score"]) == (3, 0.7)


def checkpoints_of(world, minutes, steps, monkeypatch, now):
    """The hook, and the steps that it saves; ``now`` is its clock in seconds."""
    monkeypatch.setattr(checkpoint_hook, "time", SimpleNamespace(monotonic=lambda: now[0]))
    train = SimpleNamespace(
        checkpoint_every=100, checkpoint_minutes=minutes, keep_checkpoints=2, keep_every=None
    )
    run = SimpleNamespace(stage=SimpleNamespace(train=train), world=world, folder=Path("nowhere"))
    written = SimpleNamespace(save=lambda step, *rest: steps.append(step))
    training: Any = SimpleNamespace(run=run, account=Account(), checkpoints=written, skipped=list)
    return Checkpoints(training, None)


@pytest.mark.parametrize(
    ("minutes", "saved"), [(15, [5, 8, 100, 102]), (12.5, [4, 7, 100, 102]), (0, [100]), (None, [100])]
)
def test_checkpoints_are_written_by_the_clock_and_by_the_step(monkeypatch, minutes, saved):
    steps, now = [], [0.0]
    hook = checkpoints_of(ALONE, minutes, steps, monkeypatch, now)
    for step, at in [
        (0, 16),
        (3, 10),
        (4, 14),
        (5, 16),
        (6, 20),
        (7, 29),
        (8, 31),
        (100, 32),
        (101, 40),
        (102, 50),
    ]:
        now[0] = at * 60
        assert hook.between_batches(step, last=False) is True
    assert [step for step in steps if step] == saved


def test_the_main_process_decides_when_it_is_time(monkeypatch):
    """Rank 0's clock says that 15 minutes have passed, that of the others not."""
    found = {}

    def work(world):
        hook = checkpoints_of(world, 15, [], pytest.MonkeyPatch(), [0.0])
        hook._saved_at = -900.0 if world.is_main else -0.0
        before = hook._is_time()
        hook._saved_at = 0.0 if world.is_main else -900.0
        found[world.rank] = (before, hook._is_time())

    monkeypatch.setattr(checkpoint_hook, "time", None)  # put back at the end
    on_ranks(2, work)
    assert found == {0: (True, False), 1: (True, False)}


def test_what_a_stopped_stage_did_since_its_last_step_is_forgotten(monkeypatch):
    stops, account = [], Account(next_batch=3)

    class Keeps(Hook):
        def stop(self, step):
            stops.append((step, account.next_batch, watch.training.policy.forward_equivalents))

    def draws_a_batch_and_stops():
        watch.before_batch(4)
        account.next_batch, watch.training.policy.forward_equivalents = 4, 99
        raise Stopped

    watch = watch_of(monkeypatch, account, Keeps())
    with pytest.raises(Stopped, match="s ended before its first step"), watch.stopping():
        raise Stopped
    assert stops == []
    with pytest.raises(Stopped, match="s ended after step 4, whose checkpoint is written"), watch.stopping():
        draws_a_batch_and_stops()
    assert stops == [(4, 3, 0)]


def test_a_stage_that_was_told_to_stop_takes_no_reading_first(monkeypatch):
    calls = []
    watch = watch_of(monkeypatch, Account(), Noted("reading", calls))
    monkeypatch.setattr(worlds.stopping, "requested", lambda: True)
    with pytest.raises(Stopped):
        watch.before_batch(2)
    assert calls == []


def test_the_bar_moves_at_every_step_and_reads_figures_at_those_that_are_recorded():
    moved, train = [], SimpleNamespace(steps=5, log_every=4)
    bar = SimpleNamespace(update=lambda step, **figures: moved.append((step, figures.get("loss"))))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    training: Any = SimpleNamespace(
        run=SimpleNamespace(stage=SimpleNamespace(train=train)),
        policy=SimpleNamespace(forward_equivalents=0),
        strategy=SimpleNamespace(world=ALONE, optimizer=optimizer),
    )
    records = Records(training, None, cast(Any, bar), Clock(Account()))
    for step in (1, 2, 3, 4):
        records.after_step(step, 1, {"loss": torch.tensor(step / 4)})
    records.refused(5, StepRefused("the loss"))
    assert moved == [(1, 0.25), (2, None), (3, None), (4, 1.0), (5, None)]
