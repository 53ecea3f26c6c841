"""The processes of a run: their ranks, and how they exchange values."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.distributed.environment import rank_and_world_size
from posttrain.errors import PosttrainError
from posttrain.support import stopping
from posttrain.support.heartbeat import beat, patience_seconds

T = TypeVar("T")

HEADSTART_SECONDS = 60
"""A launcher that sees a process hang says so this long before the others give up waiting for it."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    All processes must call each method but :meth:`local`, in the same order. With one process every method
    returns what it is given.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' ``values``, which have the same shape everywhere."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        with self._exchange():
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any of the processes."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def stop_if_told(self) -> None:
        """Raise Stopped in all processes if a signal told one of them to stop."""
        if self.any(stopping.requested()):
            raise stopping.Stopped

    def max(self, value: int) -> int:
        """The largest of the processes' values."""
        return max(self.gather_objects(value))

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' ``rows`` (n, ...) in the order of ranks: (size * n, ...); n is equal everywhere."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        with self._exchange():
            dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def local(self, rows: Tensor) -> Tensor:
        """This process's rows of what :meth:`gather` returned. No other process takes part."""
        return rows.chunk(self.size)[self.rank] if self.size > 1 else rows

    def gather_objects(self, value: T) -> list[T]:
        """Every process's ``value``, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The main process's ``value``."""
        if self.size == 1:
            return value
        values = [value]
        with self._exchange():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until all processes call this."""
        self.gather_objects(None)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others, which then find what it made there."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turn the loss of another process within the block into a PosttrainError."""
        beat()
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if not isinstance(error, dist.DistError) and "gloo" not in text and "NCCL" not in text:
                raise
            raise PosttrainError(
                f"process {self.rank} of {self.size} lost another one, whose error is the reason: "
                f"{text.splitlines()[0].partition('. ')[0]}"
            ) from error


ALONE = World()
"""A run of one process."""


@contextlib.contextmanager
def joined(device: torch.device, *, group: bool = False) -> Iterator[World]:
    """Join the processes that a launcher started; without a launcher, a world of this process alone.

    ``group`` makes torch's process group for one process as well, for strategies that need it. Raises
    PosttrainError if the environment does not say how to reach the others, or if processes would share a GPU.
    """
    rank, size = rank_and_world_size()
    if size == 1 and not group:
        yield ALONE
        return
    if dist.is_initialized():
        yield World(rank, size)
        return
    if size > 1 and (missing := [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]):
        raise PosttrainError(
            f"this is process {rank} of {size}, and {' and '.join(missing)} in the environment must say how "
            "to reach the others: start with --nproc, torchrun, accelerate launch or srun"
        )
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    timeout = datetime.timedelta(seconds=patience_seconds() + HEADSTART_SECONDS)
    dist.init_process_group(backend, timeout=timeout, **alone)
    try:
        world = World(rank, size)
        if device.type == "cuda" and size > 1:
            # numbers do not tell GPUs apart: Slurm may show each process its own as number 0
            own = str(torch.cuda.get_device_properties(device).uuid)
            _refuse_shared(world.gather_objects(own))
        yield world
    finally:
        # DeepSpeed keeps a reference of its own to the group, and would use it in the next run
        in_deepspeed = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None)
        (sys.modules["deepspeed.comm"] if in_deepspeed is not None else dist).destroy_process_group()


def _refuse_shared(gpus: Sequence[str]) -> None:
    """Raise PosttrainError if two processes have the same GPU. ``gpus`` are their identities by rank."""
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < rank:
            raise PosttrainError(
                f"processes {first} and {rank} would share a GPU ({gpu}): start one process for each GPU, "
                "and give no number with 'device'"
            )
