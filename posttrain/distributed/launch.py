"""Runs the command of this process again in several processes on this machine, for ``--nproc``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from posttrain.distributed.environment import rank_and_world_size
from posttrain.errors import PosttrainError

CHILD = "POSTTRAIN_CHILD"
"""Set in the environment of processes that :func:`run_in_processes` started."""
OPTIONS = ("--nproc", "--processes")
"""The commands' options for the number of processes."""


def run_in_processes(count: int) -> None:
    """Run this process's command in ``count`` processes, each with a RANK, and return when all are done.

    Only rank 0 writes to the terminal; the stderr of another rank is shown if that one fails. Raises
    PosttrainError if one fails, after stopping the others, and if a launcher started this process as one of
    several.
    """
    rank, size = rank_and_world_size()
    if size > 1:
        raise PosttrainError(
            f"this is process {rank} of {size} that a launcher started: leave {' or '.join(OPTIONS)} out"
        )
    # torch.distributed.elastic could start them, but reports those that it stops itself as failed, too
    errors = [tempfile.TemporaryFile("w+") for _ in range(count)]  # noqa: SIM115 closed below
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the exit stops the children below
    children = _started(count, errors)
    try:
        while any(child.poll() is None for child in children):
            _stop_if_failed(children, errors)
            time.sleep(0.2)
        _stop_if_failed(children, errors)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()
        for file in errors:
            file.close()
        signal.signal(signal.SIGTERM, before)


def _started(count: int, errors: Sequence[IO[str]]) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "posttrain", *_without_options(sys.argv[1:])]
    environment = {
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        CHILD: "1",
    }
    return [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL if rank else None,
            stderr=errors[rank] if rank else None,
        )
        for rank in range(count)
    ]


def _stop_if_failed(children: Sequence[subprocess.Popen], errors: Sequence[IO[str]]) -> None:
    """Raise PosttrainError if a process failed, after showing its stderr."""
    failed = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
    if not failed:
        return
    # a killed process comes first: the others fail because they cannot reach it any more
    rank = min(failed, key=lambda rank: (children[rank].returncode > 0, rank))
    if rank:
        errors[rank].seek(0)
        sys.stderr.write(errors[rank].read())
    code = children[rank].returncode
    if code >= 0:
        reason = f"failed (exit code {code}); its messages are above"
    elif -code == signal.SIGKILL:
        reason = "was killed by SIGKILL, which is what a system without free memory does"
    else:
        reason = f"was killed by {signal.Signals(-code).name}"
    raise PosttrainError(
        f"process {rank} of {len(children)} {reason}. The same command continues from where it stopped"
    )


def _without_options(arguments: list[str]) -> list[str]:
    """The command line without the options that give a number of processes."""
    kept, is_value = [], False
    for argument in arguments:
        if not is_value and argument.split("=")[0] not in OPTIONS:
            kept.append(argument)
        is_value = argument in OPTIONS
    return kept


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
