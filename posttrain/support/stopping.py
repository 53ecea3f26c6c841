"""Stops the work of this process when a signal tells it to: in order at the first, at once at the second.

SIGINT (Ctrl-C) and SIGTERM stop the work. So does SIGUSR1, by which Slurm warns of the end of a job's time.
Work that is made again on the next run is given up where it stands: :class:`Stopped` is raised. Work inside
:func:`deferred` is told by :func:`requested`, and ends where it loses nothing.

A thread counts the signals, because Python's handlers wait until the main thread is back from a call of a
library. So a second signal ends the process even while that call lasts. Every file appears by a rename, so
the end is as harmless as a kill.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. The exit code of a command that was stopped in order."""
WARNING = getattr(signal, "SIGUSR1", None)
"""A warning that may come often: it never counts as a second signal. Windows has none."""
SIGNALS = tuple(s for s in (signal.SIGINT, signal.SIGTERM, WARNING) if s is not None)
REPEAT_SECONDS = 1.0
"""A signal so soon after the first is the same one: ``timeout`` sends it to a process and to its group."""
UNWIND_SECONDS = 20.0
"""A process that was told to stop, and has nothing to keep, ends within this time whatever it waits for."""


class Stopped(BaseException):
    """A signal stopped the work; the message says what is kept.

    No Exception, so that code that turns exceptions into errors lets it pass.
    """


class _Handling:
    """The signals of this process while :func:`handling` is active."""

    def __init__(self, tell: Callable[[str], None], leave: Callable[[int], None]) -> None:
        self.tell, self.leave = tell, leave
        self.told: int | None = None
        """The first signal."""
        self.depth = 0
        """How many :func:`deferred` blocks the main thread is in."""
        self.free_since = 0.0
        """When the last of them ended, or the signal came."""
        self.raised = False

    def handler(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread."""
        del frame
        self._note(number)
        if not self.depth and not self.raised:
            self.raised = True
            raise Stopped

    def _note(self, number: int) -> None:
        if self.told is None:
            self.free_since = time.monotonic()
            self.told = number

    def watch(self, signals: socket.socket) -> None:
        """Count the signals, whose numbers the system's handler writes to ``signals``, until it is closed."""
        first_at: float | None = None
        while True:
            try:
                data = signals.recv(64)
            except TimeoutError:
                if not self.depth and time.monotonic() - self.free_since > UNWIND_SECONDS:
                    self.leave(EXIT_CODE)
                continue
            if not data:
                return
            for number in filter(SIGNALS.__contains__, data):
                if first_at is None:
                    first_at = time.monotonic()
                    signals.settimeout(UNWIND_SECONDS / 4)
                    self._note(number)
                    self._announce(number)
                elif number != WARNING and time.monotonic() - first_at > REPEAT_SECONDS:
                    self.tell(f"{signal.Signals(number).name} again: ended at once")
                    self.leave(128 + number)

    def _announce(self, number: int) -> None:
        if self.depth:
            name = signal.Signals(number).name
            self.tell(f"{name}: finishing what is in hand; a second signal stops at once")


_current: _Handling | None = None


@contextlib.contextmanager
def handling(tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Handle the signals within the block. Does nothing outside the main thread, or inside another handling.

    A signal that the process was started to ignore stays ignored. ``tell`` is called in another thread, with
    a line for the user. Raises Stopped in the block.
    """
    global _current
    if threading.current_thread() is not threading.main_thread() or _current is not None:
        yield
        return
    handling = _Handling(tell or _write, _leave)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handled = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, handling.handler) for number in handled}
    watching = threading.Thread(target=handling.watch, args=(reader,), name="signals", daemon=True)
    watching.start()
    _current = handling
    try:
        yield
    finally:
        _current = None
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        watching.join()
        reader.close()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within the block a signal raises nothing: the block asks :func:`requested`.

    Raises Stopped at the end of the block if a signal came and the block did not raise by itself.
    """
    if (current := _current) is None:
        yield
        return
    current.depth += 1
    try:
        yield
    finally:
        current.free_since = time.monotonic()
        current.depth -= 1
    if current.told is not None and not current.depth:
        current.raised = True
        raise Stopped


def requested() -> bool:
    """Whether a signal told this process to stop."""
    return _current is not None and _current.told is not None


def name_of_signal() -> str | None:
    """The name of the signal that told this process to stop."""
    return signal.Signals(_current.told).name if _current is not None and _current.told is not None else None


def ignored(worker: int = 0) -> None:
    """Ignore the signals in this process, a worker that its parent stops. Signals also go to whole groups."""
    del worker
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    """In a copy of a process that handles signals: leave them to the original."""
    global _current
    if _current is not None:
        _current = None
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _write(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def _leave(code: int) -> None:
    """End the process at once, with a terminal that shows its cursor again."""
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        with contextlib.suppress(OSError):
            os.write(1, b"\x1b[?25h\n")
    os._exit(code)
