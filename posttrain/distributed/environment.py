"""Reads this process's rank and the world size from the environment that a launcher set."""

from __future__ import annotations

import os
import subprocess

from posttrain.errors import PosttrainError

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPI = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""The variables in which mpirun sets the values of ``TORCH``: Open MPI's names, then MPICH's and Intel's."""


def rank_and_world_size() -> tuple[int, int]:
    """RANK and WORLD_SIZE as set by torchrun, accelerate, --nproc, srun or mpirun; (0, 1) without a launcher.

    Variables of srun and mpirun are copied to torch's names. Raises PosttrainError if the two are not a rank
    and a world size, or if accelerate started fewer processes than it was told to.
    """
    _copy_from_slurm()
    _copy_from_mpi()
    # accelerate sets the address of several processes even if it then starts only one, on a CPU
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ:
        raise PosttrainError(
            "accelerate launch was told to start several processes and started this one alone, as it does "
            "without GPUs: start with --nproc or torchrun, add --multi_gpu, or give --num_processes 1"
        )
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, size = map(int, given)
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise PosttrainError(
            f"RANK={given[0]} and WORLD_SIZE={given[1]} in the environment: RANK must be from 0 to "
            "WORLD_SIZE - 1"
        )
    return rank, size


def _copy_from_slurm() -> None:
    """Set torch's variables from srun's, if this is one of several tasks of a job step."""
    environment = os.environ
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    nodes, tasks = int(environment.get("SLURM_STEP_NUM_NODES", "1")), int(environment["WORLD_SIZE"])
    environment.setdefault("LOCAL_WORLD_SIZE", str(-(-tasks // nodes)))
    # the port must be the same for all tasks of a step, and another one for other jobs
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1"))


def _copy_from_mpi() -> None:
    """Set torch's variables from mpirun's, which accelerate uses on CPUs."""
    for names in MPI:
        if "RANK" not in os.environ and int(os.environ.get(names[1], "1")) > 1:
            for torch_name, mpi_name in zip(TORCH, names, strict=True):
                if mpi_name in os.environ:
                    os.environ[torch_name] = os.environ[mpi_name]


def _first_host(nodes: str) -> str:
    """The first of the hosts in Slurm's notation, such as ``node[3-4],other``."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise PosttrainError(
            f"scontrol cannot expand the list of hosts {nodes!r} ({error}); set MASTER_ADDR to the first host"
        ) from error
    return listed.stdout.split()[0]
