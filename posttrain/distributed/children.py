"""Waits for the processes of ``--nproc``: finds which failed first, is stopped or hangs, and ends all."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import PosttrainError
from posttrain.support import stopping
from posttrain.support.heartbeat import PATIENCE, beat_file, failure_file

POLL_SECONDS = 0.1
STOPPED_SECONDS = 60.0
"""A process that is stopped (SIGSTOP, Ctrl-Z) may be continued within this time."""
START_SECONDS = 300.0
"""Python, torch and the command line are loaded in this time, before the first sign."""
LAST_SECONDS = 60.0
"""Once one process stopped in order, the others end within this time, or are killed."""
KILL_SECONDS = 5.0
"""A process that was asked to end because another failed is killed after this time."""
GO_ON = "The same command goes on where it stopped"


class Child:
    """One process, and how long it has given no sign."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.rank, self.process, self.folder = rank, process, folder
        self.quiet = self.stopped = 0.0
        """Seconds without a sign that it goes on, and seconds for which it has been stopped."""
        self._last_beat = 0

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    @property
    def failed(self) -> bool:
        """Whether it ended in another way than by finishing, or by stopping in order."""
        return self.code not in (None, 0, stopping.EXIT_CODE)

    @property
    def failed_at(self) -> float:
        """When it failed, in ns. A killed one cannot say so, and comes first: the others fail because they
        cannot reach it any more."""
        if (file := failure_file(self.folder, self.rank)).is_file():
            return int(file.read_text("utf-8") or 0)
        return -math.inf if (self.code or 0) < 0 else math.inf

    def look(self, seconds: float) -> None:
        """Take note of what it did in the last ``seconds``."""
        self.stopped = self.stopped + seconds if _is_stopped(self.process) else 0.0
        file = beat_file(self.folder, self.rank)
        last_beat = file.stat().st_mtime_ns if file.is_file() else 0
        self.quiet = self.quiet + seconds if last_beat == self._last_beat else 0.0
        self._last_beat = last_beat

    @property
    def has_begun(self) -> bool:
        """Whether it gave a sign yet."""
        return self._last_beat > 0

    def show_errors(self) -> None:
        """Write its stderr to this process's; that of rank 0 is there already."""
        sys.stderr.flush()
        if (file := self.folder / f"{self.rank}.stderr").is_file():
            sys.stderr.write(file.read_text("utf-8", errors="replace"))

    def show_place(self) -> None:
        """Let it write the calls in which each of its threads is to its stderr."""
        if hasattr(signal, "SIGUSR2"):
            self.process.send_signal(signal.SIGUSR2)
            time.sleep(1)


def wait_for_all(children: Sequence[Child], patience: float) -> None:
    """Return when all are done. Passes a signal of this process on to them.

    Raises Stopped if they stopped in order, and PosttrainError if one failed, has been stopped for a minute,
    or has given no sign for ``patience`` seconds.
    """
    told, last, ending = False, time.monotonic(), 0.0
    while any(child.code is None for child in children):
        if stopping.requested() and not told:
            told = True
            for child in children:
                # a warning: to a terminal's Ctrl-C, which reached the child as well, it is no second signal
                _send(child.process, stopping.WARNING or signal.SIGTERM)
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        # this process may have been stopped itself: then the time was not one in which it looked
        passed, last = min(now - last, 10 * POLL_SECONDS), now
        if any(child.code == stopping.EXIT_CODE for child in children):
            ending += passed
            if ending > LAST_SECONDS:
                break
            continue
        _raise_if_failed(children)
        _raise_if_hanging([child for child in children if child.code is None], passed, patience)
    if any(child.code == stopping.EXIT_CODE for child in children):
        raise stopping.Stopped
    _raise_if_failed(children)


def end_all(children: Sequence[Child]) -> None:
    """End those that still run: the work of one that failed cannot go on without it."""
    for child in children:
        if child.code is None:
            _send(child.process, signal.SIGTERM)
    until = time.monotonic() + KILL_SECONDS
    for child in children:
        try:
            child.process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def _raise_if_failed(children: Sequence[Child]) -> None:
    """Raise PosttrainError for the process that failed first, after showing its stderr.

    Some may fail because another one is about to leave: a signal told it to stop, and it has closed its
    connections. Such a stop is no failure.
    """
    failed = [child for child in children if child.failed]
    if not failed or _one_stops_soon(children):
        return
    first = min(failed, key=lambda child: (child.failed_at, child.rank))
    first.show_errors()
    code = first.code or 0
    if code > 0:
        reason = f"failed (exit code {code}); its messages are above"
    elif -code == signal.SIGKILL:
        reason = "was killed by SIGKILL, which is what a system without free memory does"
    else:
        reason = f"was killed by {signal.Signals(-code).name}"
    raise PosttrainError(f"process {first.rank} of {len(children)} {reason}. {GO_ON}")


def _one_stops_soon(children: Sequence[Child]) -> bool:
    until = time.monotonic() + KILL_SECONDS
    while time.monotonic() < until and any(child.code is None for child in children):
        if any(child.code == stopping.EXIT_CODE for child in children):
            return True
        time.sleep(POLL_SECONDS)
    return any(child.code == stopping.EXIT_CODE for child in children)


def _raise_if_hanging(running: Sequence[Child], passed: float, patience: float) -> None:
    """Raise PosttrainError for a process that is stopped, or for the one that has given no sign longest."""
    for child in running:
        child.look(passed)
    for child in running:
        if child.stopped > min(STOPPED_SECONDS, patience):
            raise PosttrainError(
                f"process {child.rank} has been stopped for {child.stopped:.0f} s (SIGSTOP or Ctrl-Z; kill "
                f"-CONT {child.process.pid} would have continued it), so all were ended. {GO_ON}"
            )
    late = [c for c in running if c.quiet > (patience if c.has_begun else max(patience, START_SECONDS))]
    if slowest := max(late, key=lambda child: child.quiet, default=None):
        slowest.show_place()
        slowest.show_errors()
        raise PosttrainError(
            f"process {slowest.rank} gave no sign for {slowest.quiet / 60:.3g} minutes, so all were ended; "
            f"where it hung is above ({PATIENCE} in the environment is this limit, in minutes). {GO_ON}"
        )


def _is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process is stopped by a signal, where the system tells."""
    if not hasattr(os, "waitid") or process.returncode is not None:
        return False
    try:
        return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
