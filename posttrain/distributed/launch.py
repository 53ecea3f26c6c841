"""How does one command become several processes that share its work?"""

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

from posttrain.errors import PosttrainError

CHILD = "POSTTRAIN_CHILD"
"""Set in the environment of processes that :func:`share` started."""
OPTIONS = ("--nproc", "--processes")
"""How the commands call the number of processes."""
MPI = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in mpirun's words: Open MPI's, and MPICH's or Intel's."""


def place() -> tuple[int, int]:
    """RANK and WORLD_SIZE, as torchrun, accelerate, :func:`share`, srun or mpirun set them; 0 of 1 without.

    Raises PosttrainError where they make no sense, or a launcher meant more processes than it started.
    """
    _from_slurm()
    _from_mpi()
    # of several processes accelerate says where the first is, even where it then starts only one: on a CPU
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ:
        raise PosttrainError(
            "accelerate launch was told of several processes and started this one alone, as it does without "
            "GPUs: start with --nproc or torchrun, add --multi_gpu, or give --num_processes 1"
        )
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

    Afterwards the caller goes on alone, and finds the work done. Only the first of them says how it goes;
    what another says on stderr is shown where it is the one that fails. Raises PosttrainError where one
    fails, after stopping the others; and where this is itself one of several.
    """
    rank, size = place()
    if size > 1:
        raise PosttrainError(
            f"this is process {rank} of {size} that a launcher started: leave {' or '.join(OPTIONS)} out"
        )
    command = [sys.executable, "-m", "posttrain", *_without_processes(sys.argv[1:])]
    threads = str(max((os.cpu_count() or 1) // processes, 1))
    shared = {
        "OMP_NUM_THREADS": threads,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        CHILD: "1",
    }
    said = [tempfile.TemporaryFile("w+") for _ in range(processes)]  # noqa: SIM115 closed below
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which stops the children below
    children = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.DEVNULL if r else None,
            stderr=said[r] if r else None,
        )
        for r in range(processes)
    ]
    try:
        while any(child.poll() is None for child in children):
            _stop_if_failed(children, said)
            time.sleep(0.2)
        _stop_if_failed(children, said)
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            child.wait()
        for file in said:
            file.close()
        signal.signal(signal.SIGTERM, before)


def _stop_if_failed(children: Sequence[subprocess.Popen], said: Sequence[IO[str]]) -> None:
    failed = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
    if not failed:
        return
    # one that is killed takes the others with it: they find nobody at the other end
    rank = min(failed, key=lambda rank: (children[rank].returncode > 0, rank))
    if rank:
        said[rank].seek(0)
        sys.stderr.write(said[rank].read())
    code = children[rank].returncode
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ", as a system does that has no memory left"
    else:
        how = f"failed (exit code {code}); what it said is above"
    raise PosttrainError(
        f"process {rank} of {len(children)} {how}. The same command goes on with what is done"
    )


def _without_processes(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.split("=")[0] not in OPTIONS:
            kept.append(argument)
        skip = argument in OPTIONS
    return kept


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _from_slurm() -> None:
    """Say in torch's words what srun says in its own, where this is one of several tasks of a job step."""
    environment = os.environ
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    nodes, tasks = int(environment.get("SLURM_STEP_NUM_NODES", "1")), environment["WORLD_SIZE"]
    environment.setdefault("LOCAL_WORLD_SIZE", str(-(-int(tasks) // nodes)))
    # tasks of one step must agree on a port that other jobs do not take
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    if "MASTER_ADDR" not in environment:
        listed = environment.get("SLURM_STEP_NODELIST", "127.0.0.1")
        environment["MASTER_ADDR"] = _first_host(listed)


def _from_mpi() -> None:
    """Say in torch's words what mpirun says in its own; accelerate uses it on CPUs."""
    environment = os.environ
    for names in MPI:
        if "RANK" not in environment and int(environment.get(names[1], "1")) > 1:
            for torchs, name in zip(
                ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), names, strict=True
            ):
                if name in environment:
                    environment[torchs] = environment[name]


def _first_host(listed: str) -> str:
    if "[" not in listed:
        return listed.split(",")[0]
    try:
        found = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise PosttrainError(
            f"scontrol cannot say which hosts {listed!r} are ({error}); set MASTER_ADDR to the first"
        ) from error
    return found.stdout.split()[0]
