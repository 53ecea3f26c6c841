"""Runs the command of this process again in several processes on this machine, for ``--nproc``."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from posttrain.distributed.children import Child, end_all, wait_for_all
from posttrain.distributed.environment import rank_and_world_size
from posttrain.errors import PosttrainError
from posttrain.support.heartbeat import CHILD, FOLDER, anew_file, note_begun_anew, patience_seconds
from posttrain.support.stopping import deferred

PORTS = range(20_000, 32_768)
"""Below those that Linux, macOS and Windows give to programs that ask for any port."""
OPTIONS = ("--nproc", "--processes")
"""The commands' options for the number of processes."""


def run_in_processes(count: int) -> None:
    """Run this process's command in ``count`` processes, each with a RANK, and return when all are done.

    Only rank 0 writes to the terminal; the stderr of another rank is shown if that one fails. A signal that
    stops this process stops them in order. Raises Stopped then, and PosttrainError, after stopping the
    others, if one fails, is stopped, or gives no sign for as long as
    :func:`posttrain.support.heartbeat.patience_seconds` says; also if a launcher started this process as
    one of several.
    """
    rank, size = rank_and_world_size()
    if size > 1:
        raise PosttrainError(
            f"this is process {rank} of {size} that a launcher started: leave {' or '.join(OPTIONS)} out"
        )
    patience = patience_seconds()
    # torch.distributed.elastic could start them, but reports those that it stops itself as failed, too
    with deferred(), tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        children = _started(count, Path(folder))
        try:
            wait_for_all(children, patience)
        finally:
            end_all(children)
            if anew_file(folder).exists():
                note_begun_anew()


def _started(count: int, folder: Path) -> list[Child]:
    command = [sys.executable, "-m", "posttrain", *_without_options(sys.argv[1:])]
    environment = {
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // count, 1)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        CHILD: str(os.getpid()),
        FOLDER: str(folder),
    }
    children = []
    for rank in range(count):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if not rank:
            process = subprocess.Popen(command, env=own)
        else:
            with (folder / f"{rank}.stderr").open("wb") as errors:
                process = subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=errors)
        children.append(Child(rank, process, folder))
    return children


def _without_options(arguments: Sequence[str]) -> list[str]:
    """The command line without the options that give a number of processes."""
    kept, is_value = [], False
    for argument in arguments:
        if not is_value and argument.split("=")[0] not in OPTIONS:
            kept.append(argument)
        is_value = argument in OPTIONS
    return kept


def _free_port() -> int:
    """A port that no program uses now, and that no system gives to one that asks for any port.

    The processes open it only seconds later, when they have loaded. Raises PosttrainError if there is none.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as listening:
            listening.bind(("127.0.0.1", port))
            return port
    raise PosttrainError(f"none of the ports {PORTS[0]} to {PORTS[-1]} is free: set MASTER_PORT")
