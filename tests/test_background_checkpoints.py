"""Checkpoints are written while training goes on: what is written, who learns of an error, and what a kill leaves."""

import os
import threading

import pytest
from forked import finished
from ranks import on_ranks
from runs import recipe, run_quietly, stage
from stored import whole_state
from test_checkpoints import ALL, folder_of, go_on, same, started, state, steps

from posttrain.engine import checkpoint_folder, writing
from posttrain.engine.background import Background
from posttrain.engine.checkpoint_folder import saved
from posttrain.engine.state import State
from posttrain.errors import PosttrainError


@pytest.fixture
def held(monkeypatch):
    """Writes wait until this is set."""
    event, save = threading.Event(), writing.write_pieces

    def waiting(*arguments):
        assert event.wait(60)
        return save(*arguments)

    monkeypatch.setattr(writing, "write_pieces", waiting)
    yield event
    event.set()


@pytest.fixture
def full(monkeypatch):
    """The disk is full."""

    def refused(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write_pieces", refused)


FULL = r"cannot write .*step-0000000\d': the disk is full"


def ended(folder):
    """Wait for the thread alone."""
    assert folder._background._thread.daemon
    folder._background._thread.join()


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path, held):
    policy, strategy = started(steps=2)
    weights, moments = (
        state(policy),
        {n: m["exp_avg"].values.clone() for n, m in kept_moments(policy, strategy)},
    )
    extra = {"rewards": [1.0]}
    with folder_of(tmp_path, policy, strategy) as folder:
        folder.save(2, extra, ALL)
        assert steps(tmp_path) == [], "it is not written yet, and training goes on"
        go_on(policy, strategy, 3)
        assert not same(state(policy)[None], weights[None])
        held.set()
    other, resumed = started(seed=1)
    assert folder_of(tmp_path, other, resumed).restore().extra == extra
    assert same(state(other)[None], weights[None])
    assert same(state(other)["ema"], weights["ema"])
    assert {n: m["step"].values.item() for n, m in kept_moments(other, resumed)} == dict.fromkeys(moments, 2)
    assert same({n: m["exp_avg"].values for n, m in kept_moments(other, resumed)}, moments)


def test_the_main_process_of_several_has_a_copy_too(tmp_path, held):
    def work(world):
        policy, strategy = started(steps=2, world=world)
        before = state(policy)[None]
        folder = folder_of(tmp_path, policy, strategy)
        folder.save(2, {}, ALL)
        go_on(policy, strategy, 3)
        world.barrier()
        held.set()
        folder.wait()
        return before

    first, _ = on_ranks(2, work)
    assert same(whole_state(tmp_path / "step-00000002")["trained"], first)


def kept_moments(policy, strategy):
    return [(name, strategy.moments(name)) for name in policy.trained]


def test_the_next_save_and_a_restore_wait_so_that_there_is_one_copy(tmp_path, held, monkeypatch):
    policy, strategy = started(steps=1)
    found, copied = [], State.copied
    monkeypatch.setattr(State, "copied", lambda state: (found.append(steps(tmp_path)), copied(state))[1])
    folder = folder_of(tmp_path, policy, strategy)
    folder.save(2, {}, ALL)
    folder.save(2, {}, ALL)  # it is on its way
    folder.check()
    threading.Timer(0.1, held.set).start()
    folder.save(4, {}, ALL)
    assert found == [[], [2]]
    assert folder.restore().step == 4
    folder.drop_after(2)
    folder.save(4, {}, ALL)
    folder.wait()
    assert steps(tmp_path) == [2, 4]


def test_a_process_that_ends_does_not_wait():
    def work():
        Background().start(threading.Event().wait)

    assert finished(work, seconds=60).returncode == 0


@pytest.mark.parametrize("asks", ["check", "wait", "restore", "save", "the end"])
def test_an_error_is_raised_with_its_file_by_who_asks_next(tmp_path, full, asks):
    folder = folder_of(tmp_path, *started())
    folder.check()
    folder.save(2, {}, ALL)
    ended(folder)
    with pytest.raises(PosttrainError, match=FULL):
        {
            "check": folder.check,
            "wait": folder.wait,
            "restore": folder.restore,
            "save": lambda: folder.save(4, {}, ALL),
            "the end": lambda: folder.__exit__(None, None, None),
        }[asks]()
    folder.check()
    folder.wait()
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_a_fault_of_the_code_is_raised_as_it_is(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, *started())
    monkeypatch.setattr(writing, "write_pieces", lambda *_: [].pop())
    folder.save(2, {}, ALL)
    with pytest.raises(IndexError):
        folder.wait()


def test_all_processes_learn_of_an_error(tmp_path, full):
    def work(world):
        folder = folder_of(tmp_path, *started(world=world))
        folder.save(2, {}, ALL)
        with pytest.raises(PosttrainError) as found:
            folder.wait()
        return str(found.value)

    first, second = on_ranks(2, work)
    assert first == second
    assert "the disk is full" in first


def fail_while_writing(folder):
    with folder:
        folder.save(2, {}, ALL)
        raise ZeroDivisionError


def test_an_error_of_the_stage_goes_on_and_that_of_the_checkpoint_is_told(tmp_path, full):
    told = []
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(folder_of(tmp_path, *started(), told=told))
    assert len(told) == 1
    assert "step-00000002': the disk is full" in told[0]


def test_a_stage_that_fails_still_writes_its_checkpoint(tmp_path, held):
    threading.Timer(0.1, held.set).start()
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(folder_of(tmp_path, *started()))
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(("bytes_free", "beside"), [(0, 0), (1.9, 0), (2, 1), (None, 1)])
def test_where_memory_has_no_room_for_a_copy_training_waits(tmp_path, monkeypatch, bytes_free, beside):
    policy, strategy = started()
    folder, size = folder_of(tmp_path, policy, strategy), 4 * 420 * 2  # weights and EMA
    assert sum(p.numel() for p in policy.trained.values()) == 420
    free = None if bytes_free is None else int(bytes_free * size)
    monkeypatch.setattr(checkpoint_folder, "available_memory", lambda device: free)
    made, waited, copied, wait = [], [], State.copied, folder._background.wait
    monkeypatch.setattr(State, "copied", lambda state: (made.append(1), copied(state))[1])
    monkeypatch.setattr(folder._background, "wait", lambda: (waited.append(steps(tmp_path)), wait())[1])
    folder.save(2, {}, ALL)
    assert (len(made), len(waited)) == (beside, 2 - beside), "the first one is for the save before"
    folder.wait()
    assert steps(tmp_path) == [2]


def test_a_kill_in_the_middle_leaves_the_one_before(tmp_path):
    def dying():
        policy, strategy = started(steps=2)
        folder, save = folder_of(tmp_path, policy, strategy), writing.write_pieces
        folder.save(2, {"n": 2}, ALL)
        folder.wait()
        half = threading.Event()

        def torn(file, pieces):
            save(file, pieces)
            half.set()
            threading.Event().wait()

        writing.write_pieces = torn
        folder.save(4, {"n": 4}, ALL)
        assert half.wait(60)
        os.kill(os.getpid(), 9)

    assert finished(dying).returncode == -9
    policy, strategy = started()
    with folder_of(tmp_path, policy, strategy) as folder:
        assert folder.restore().extra == {"n": 2}
        assert len(list(tmp_path.iterdir())) == 2, "what was begun is there under another name"
        folder.save(6, {}, ALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000006"]


def test_a_run_ends_at_the_step_after_a_checkpoint_that_could_not_be_written(tmp_path, monkeypatch):
    save, folder = writing.write_pieces, tmp_path / "run"

    def fills(file, pieces):
        if "step-00000004" in str(file):
            raise OSError(28, "No space left on device")
        return save(file, pieces)

    monkeypatch.setattr(writing, "write_pieces", fills)
    with pytest.raises(
        PosttrainError, match=r"cannot write .*sft/checkpoints/step-00000004': the disk is full"
    ):
        run_quietly(recipe(stage("sft")), folder)
    assert [path.name for path in saved(folder / "sft" / "checkpoints")] == ["step-00000002"]
    assert not (folder / "sft" / "final").exists()
