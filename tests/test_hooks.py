"""Tests how a stage's hooks are called around its steps, and what time counts as training."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.stages import account as accounts
from posttrain.stages import watch as watches
from posttrain.stages.account import Account, Clock
from posttrain.stages.hooks.hook import Hook
from posttrain.stages.hooks.smaller_micro_batch import SmallerMicroBatch
from posttrain.stages.hooks.totals import Totals
from posttrain.stages.watch import StageWatch


class Noted(Hook):
    """Notes each call, and ends the stage at step ``ends``."""

    def __init__(self, name, calls, ends=None):
        self.name, self.calls, self.ends = name, calls, ends

    def between_batches(self, step, *, last):
        self.calls.append((self.name, step, last))
        return step != self.ends

    def after_step(self, step, samples, metrics):
        self.calls.append((self.name, step, samples, metrics))


def watch_of(monkeypatch, account, *hooks):
    monkeypatch.setattr(watches, "hooks_of", lambda *arguments: list(hooks))
    stage = SimpleNamespace(train=SimpleNamespace(steps=6))
    training: Any = SimpleNamespace(account=account, run=SimpleNamespace(stage=stage))
    bar: Any = None
    return StageWatch(training, None, bar)


def test_hooks_are_called_in_order_at_each_moment(monkeypatch):
    calls = []
    watch = watch_of(monkeypatch, Account(), Noted("a", calls), Hook(), Noted("b", calls))
    assert watch.before_batch(4) is True
    watch.after_step(5, 2, {})
    watch.finish()
    assert calls == [
        ("a", 4, False),
        ("b", 4, False),
        ("a", 5, 2, {}),
        ("b", 5, 2, {}),
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
