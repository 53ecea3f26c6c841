"""The launcher of --nproc: which process failed first, is stopped or hangs, and that none outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.distributed import children as module
from posttrain.distributed.children import Child, end_all, wait_for_all
from posttrain.errors import PosttrainError
from posttrain.support import heartbeat, stopping
from posttrain.support.heartbeat import beat_file, failure_file, patience_seconds
from posttrain.support.stopping import Stopped

ROOT = Path(__file__).parent.parent
WAITS = "import time; time.sleep(60)"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts small programs as the processes of a run."""
    made = []
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(module, "KILL_SECONDS", 0.3)

    def start(*programs):
        for rank, program in enumerate(programs):
            with (tmp_path / f"{rank}.stderr").open("wb") as errors:
                process = subprocess.Popen([sys.executable, "-S", "-c", program], stderr=errors)
            made.append(Child(rank, process, tmp_path))
        return made

    yield start
    end_all(made)
    assert all(child.code is not None for child in made)


def test_all_that_finish_are_waited_for(started):
    children = started("", "import time; time.sleep(.1)")
    wait_for_all(children, patience=60)
    assert [child.code for child in children] == [0, 0]


@pytest.mark.parametrize(
    ("programs", "times", "first"),
    [
        (["import sys; sys.exit(1)", "import os; os.kill(os.getpid(), 9)"], {}, "process 1 of 2 was killed by SIGKILL"),
        (["import os; os.abort()", ""], {}, "process 0 of 2 was killed by SIGABRT"),
        (["import sys; sys.exit(1)", "import sys; sys.exit(2)"], {0: 20, 1: 10}, r"process 1 of 2 failed \(exit code 2\)"),
        (["import sys; sys.exit(1)", "import sys; sys.exit(2)"], {0: 10, 1: 20}, r"process 0 of 2 failed \(exit code 1\)"),
        (["import sys; sys.exit(1)", "import sys; sys.exit('its words')"], {1: 5}, "process 1 of 2 failed"),
    ],
)  # fmt: skip
def test_the_process_that_failed_first_is_named(started, tmp_path, capsys, programs, times, first):
    children = started(*programs)
    for rank, at in times.items():
        failure_file(tmp_path, rank).write_text(str(at))
    for child in children:
        child.process.wait()
    with pytest.raises(PosttrainError, match=f"{first}.*The same command goes on"):
        wait_for_all(children, patience=60)
    assert ("its words" in capsys.readouterr().err) == ("its words" in programs[1])


def test_a_stopped_process_is_named_after_a_while(started):
    children = started(WAITS, WAITS)
    os.kill(children[1].process.pid, signal.SIGSTOP)
    with pytest.raises(PosttrainError, match=r"process 1 has been stopped for \d+ s .*so all were ended"):
        wait_for_all(children, patience=0.3)


def test_a_process_that_goes_on_after_a_stop_is_left_alone(started):
    children = started(WAITS)
    os.kill(children[0].process.pid, signal.SIGSTOP)
    while not module._is_stopped(children[0].process):
        time.sleep(0.01)
    children[0].look(0.2)
    assert children[0].stopped == 0.2
    os.kill(children[0].process.pid, signal.SIGCONT)
    while module._is_stopped(children[0].process):
        time.sleep(0.01)
    children[0].look(0.2)
    assert children[0].stopped == 0


def test_a_process_that_gives_no_sign_is_named_with_the_place_where_it_hangs(started, tmp_path, capsys):
    hangs = (
        "import faulthandler, signal, time\nfaulthandler.register(signal.SIGUSR2, all_threads=True)\n"
        f"def hung():\n    open({str(beat_file(tmp_path, 0))!r}, 'w').close()\n    time.sleep(60)\nhung()"
    )
    children = started(hangs, WAITS)
    with pytest.raises(PosttrainError, match=r"process 0 gave no sign for .*POSTTRAIN_PATIENCE"):
        wait_for_all(children, patience=0.3)
    assert "in hung" in capsys.readouterr().err


def test_signs_and_the_time_until_the_first_count(started, tmp_path, monkeypatch):
    (child,) = started(WAITS)
    for name, value in {heartbeat.FOLDER: str(tmp_path), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    child.look(5)
    assert (child.has_begun, child.quiet) == (False, 5)
    module._raise_if_hanging([child], 10, patience=1)  # it is still being loaded
    heartbeat.beat()
    child.look(5)
    assert (child.has_begun, child.quiet) == (True, 0)
    child.look(5)
    assert child.quiet == 5


def listening(folder, handler, number=0):
    """A program that installs ``handler``, says so with a file, and waits."""
    return f"{handler}\nopen({str(folder / f'ready-{number}')!r}, 'w').close()\ntime.sleep(60)"


def heard(folder, count):
    while len(list(folder.glob("ready-*"))) < count:
        time.sleep(0.01)


def test_a_signal_of_the_launcher_is_passed_on_and_awaited(started, tmp_path, monkeypatch):
    stops = "import signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit({}))\n"
    # one fails, because the other has left
    children = started(*(listening(tmp_path, stops.format(code), n) for n, code in enumerate((75, 1))))
    heard(tmp_path, 2)
    monkeypatch.setattr(module, "KILL_SECONDS", 60)  # one that fails waits as long for the other to stop
    monkeypatch.setattr(stopping, "requested", lambda: True)
    with pytest.raises(Stopped):
        wait_for_all(children, patience=60)


def test_one_that_fails_because_another_is_about_to_leave_is_no_failure(started, monkeypatch):
    """A signal came to one process alone, which is slower to end than the one that lost it."""
    children = started("import sys, time; time.sleep(1); sys.exit(75)", "import sys; sys.exit(1)")
    children[1].process.wait()
    monkeypatch.setattr(module, "KILL_SECONDS", 60)
    with pytest.raises(Stopped):
        wait_for_all(children, patience=60)


def test_a_process_that_does_not_end_when_asked_is_killed(started, tmp_path):
    handler = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)"
    (child,) = started(listening(tmp_path, handler))
    heard(tmp_path, 1)
    end_all([child])
    assert child.code == -signal.SIGKILL


@pytest.mark.parametrize("by", [heartbeat.CHILD, heartbeat.ELASTIC])
def test_processes_end_with_a_launcher_that_is_killed(by):
    program = (
        "import os, subprocess, sys, time\n"
        f"os.environ[{by!r}] = str(os.getpid())\n"
        "subprocess.Popen([sys.executable, '-c', 'import os, time\\n"
        "from posttrain.support import heartbeat\\nheartbeat.LOOK_SECONDS = 0.05\\n"
        "heartbeat.watch_launcher()\\nprint(os.getpid(), flush=True)\\ntime.sleep(60)'])\n"
        "time.sleep(60)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert launcher.stdout is not None
    with launcher.stdout as out:
        int(out.readline())
        launcher.kill()
        launcher.wait()
        assert out.read() == b"", "the pipe ends with its last writer"


@pytest.mark.parametrize(("given", "seconds"), [(None, 1800), ("0.5", 30), ("90", 5400)])
def test_patience_is_in_minutes(monkeypatch, given, seconds):
    monkeypatch.delenv(heartbeat.PATIENCE, raising=False)
    if given:
        monkeypatch.setenv(heartbeat.PATIENCE, given)
    assert patience_seconds() == seconds


@pytest.mark.parametrize("given", ["", "0", "-1", "soon", "nan", "inf"])
def test_patience_that_is_no_time_is_refused(monkeypatch, given):
    monkeypatch.setenv(heartbeat.PATIENCE, given)
    with pytest.raises(PosttrainError, match=r"POSTTRAIN_PATIENCE.*a number of minutes greater than 0"):
        patience_seconds()
