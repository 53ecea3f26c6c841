"""How does one command become several processes that share its work?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from posttrain.errors import PosttrainError

CHILD = "POSTTRAIN_CHILD"
"""Set in the environment of processes that :func:`share` started."""


def place() -> tuple[int, int]:
    """RANK and WORLD_SIZE, as torchrun and :func:`share` set them; 0 of 1 without. Raises PosttrainError."""
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = map(int, given)
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        raise PosttrainError(f"RANK={given[0]} of WORLD_SIZE={given[1]} in the environment is no place")
    return rank, world


def share(processes: int) -> None:
    """Run this very command in ``processes`` processes, each with its RANK of WORLD_SIZE, until all are done.

    Afterwards the caller goes on alone, and finds the work done. Only the first of them says how it goes.
    Raises PosttrainError where one fails, after stopping the others.
    """
    command = [sys.executable, "-m", "posttrain", *_without_processes(sys.argv[1:])]
    threads = str(max((os.cpu_count() or 1) // processes, 1))
    shared = {"OMP_NUM_THREADS": threads, **os.environ, "WORLD_SIZE": str(processes), CHILD: "1"}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops the children below
    children = [
        subprocess.Popen(command, env={**shared, **rank}, stdout=subprocess.DEVNULL if i else None)
        for i, rank in enumerate(ranks)
    ]
    try:
        while any(child.poll() is None for child in children):
            _stop_if_failed(children)
            time.sleep(0.2)
        _stop_if_failed(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()
        signal.signal(signal.SIGTERM, before)


def _stop_if_failed(children: list[subprocess.Popen]) -> None:
    for rank, child in enumerate(children):
        if child.poll() not in (None, 0):
            raise PosttrainError(
                f"process {rank} of {len(children)} failed (exit code {child.returncode}); what it said is "
                "above. The same command goes on with what is done"
            )


def _without_processes(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--processes" and not argument.startswith("--processes="):
            kept.append(argument)
        skip = argument == "--processes"
    return kept
