"""The first signal stops the work in order, the second at once."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from posttrain.support import stopping
from posttrain.support.stopping import Stopped, deferred, handling, requested

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.fixture(autouse=True)
def not_ignored(monkeypatch):
    """Some shells start what runs in the background with SIGINT ignored."""
    before = signal.signal(INT, signal.default_int_handler)
    yield
    signal.signal(INT, before)


@pytest.mark.parametrize("number", [INT, TERM, USR1])
def test_a_signal_gives_up_what_is_in_hand_and_handlers_are_put_back(number):
    before = {n: signal.getsignal(n) for n in (INT, TERM, USR1)}
    with handling(print):
        with pytest.raises(Stopped):
            signal.raise_signal(number)
        assert requested()
        assert stopping.name_of_signal() == signal.Signals(number).name
    assert {n: signal.getsignal(n) for n in before} == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not requested()
    assert stopping.name_of_signal() is None


def test_deferred_work_goes_on_until_its_end():
    done = []

    def work():
        with deferred():
            with deferred():
                signal.raise_signal(TERM)
                assert requested()
            done.append("the inner block raises nothing")

    def fails():
        with deferred():
            raise ValueError("its own")

    with handling(print):
        with pytest.raises(Stopped):
            work()
        assert done
        with pytest.raises(ValueError, match="its own"):
            fails()


def test_without_a_signal_nothing_is_raised():
    with handling(print), deferred():
        assert not requested()


def test_outside_the_main_thread_and_without_handling_nothing_is_installed():
    before, found = signal.getsignal(TERM), []

    def work():
        with handling(print), deferred():
            found.append((signal.getsignal(TERM), requested()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, False)]


def test_a_signal_that_was_ignored_from_the_start_stays_ignored():
    signal.signal(INT, signal.SIG_IGN)
    with handling(print):
        signal.raise_signal(INT)
        assert not requested()


class Scripted:
    """A socket that gives the signals of a script, at its times. None: nothing came in time."""

    def __init__(self, script, clock):
        self.script, self.clock = list(script), clock

    def settimeout(self, seconds):
        self.timeout = seconds

    def recv(self, size):
        if not self.script:
            return b""
        at, numbers = self.script.pop(0)
        self.clock[0] = at
        if numbers is None:
            raise TimeoutError
        return bytes(numbers)


SCRIPTS = {
    "one": ([(0, [TERM])], [], 1),
    "sent to the process and to its group": ([(0, [TERM, TERM])], [], 1),
    "again within a second": ([(0, [INT]), (0.9, [INT])], [], 1),
    "again after it": ([(0, [INT]), (1.1, [INT])], [130], 2),
    "another one": ([(0, [INT]), (5, [TERM])], [143], 2),
    "after the warning": ([(0, [USR1]), (60, [TERM])], [143], 2),
    "warnings are no second signal": ([(0, [TERM]), (9, [USR1]), (10, [USR1])], [], 1),
    "others are not counted": ([(0, [signal.SIGCHLD]), (9, [TERM]), (9.5, [signal.SIGCHLD])], [], 1),
    "work that may take its time": ([(0, [TERM]), (500, None)], [], 1),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_which_signal_ends_the_process_at_once(monkeypatch, name):
    script, left, said = SCRIPTS[name]
    clock, codes, lines = [0.0], [], []
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watched = stopping._Handling(lines.append, codes.append)
    watched.depth = 1
    watched.watch(Scripted(script, clock))
    assert (codes, len(lines)) == (left, said)


def test_work_without_anything_to_keep_ends_in_time_whatever_it_waits_for(monkeypatch):
    clock, codes = [0.0], []
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watched = stopping._Handling(print, codes.append)
    watched.watch(Scripted([(5, [TERM]), (24, None)], clock))
    assert codes == []
    watched = stopping._Handling(print, codes.append)
    watched.watch(Scripted([(5, [TERM]), (26, None)], clock))
    assert codes == [stopping.EXIT_CODE]


def test_a_copy_of_the_process_leaves_the_signals_to_the_original():
    with handling(print):
        child = os.fork()
        if not child:
            signal.raise_signal(USR1)
            signal.raise_signal(INT)
            os._exit(3 if signal.getsignal(TERM) == signal.SIG_DFL and not requested() else 4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert not requested(), "its signals are not this process's"


def test_workers_ignore_what_is_sent_to_the_whole_group():
    child = os.fork()
    if not child:
        stopping.ignored(0)
        for number in (INT, TERM, USR1):
            os.kill(os.getpid(), number)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
