"""Runs functions in forked children, some at a time, within limits of time and memory."""

from __future__ import annotations

import functools
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

SURVIVED, KILLED, NOT_POSSIBLE, TOO_LONG = 0, 1, 3, 4
"""How a mutant ended; NOT_POSSIBLE is one that the running process cannot take in."""


def forked(run: Callable[[], int], *, silent: bool = True) -> int:
    """Start ``run`` in a child process, which ends with its result; return the child's id."""
    if pid := os.fork():
        return pid
    code = KILLED
    try:
        os.setpgid(0, 0)
        if silent:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1), os.dup2(sink, 2)
        code = run()
    except BaseException as error:
        if not silent:
            sys.excepthook(type(error), error, error.__traceback__)
    finally:
        os._exit(code)


def outcomes(jobs: Iterable[tuple[int, Callable[[], int], float]], at_once: int) -> Iterator[tuple[int, int]]:
    """Run (number, function, seconds allowed) in children, ``at_once`` together; yield (number, exit code).

    A child that uses more processor time than allowed is stopped; one that crashes counts as killed.
    """
    waiting, running = iter(jobs), {}
    while True:
        while len(running) < at_once and (job := next(waiting, None)) is not None:
            number, function, seconds = job
            # in processor time, so that a busy machine stops nothing; the other limit is for what waits forever
            pid = forked(functools.partial(limited, function, seconds))
            running[pid] = (number, time.monotonic() + 60 + seconds / 3)
        if not running:
            return
        time.sleep(0.003)
        for pid, (number, deadline) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, 0)
            if done:
                del running[pid]
                code = os.waitstatus_to_exitcode(status)
                if code in (-signal.SIGKILL, -signal.SIGXCPU):
                    code = TOO_LONG
                yield number, code if code in (SURVIVED, NOT_POSSIBLE, TOO_LONG) else KILLED


def limited(function: Callable[[], int], seconds: float) -> int:
    """Run ``function`` in at most so much processor time and 4 GiB: a mutant may go on, or grow, without end."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * 2**30, resource.RLIM_INFINITY))
    limit = min(math.ceil(seconds), 100_000)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    return function()
