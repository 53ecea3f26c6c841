"""Which process is this of how many, and how do they tell each other things?"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.distributed.launch import place
from posttrain.errors import PosttrainError

T = TypeVar("T")

PATIENCE = datetime.timedelta(minutes=30)
"""How long one process waits for the others: as long as the slowest reward may take."""


@dataclass(frozen=True)
class World:
    """The processes of a run. Every method but ``main`` must be called by all of them, in the same order;
    of one process each is the identity."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values``, of the same shape everywhere, added up."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def max(self, value: int) -> int:
        """The greatest of the processes' values."""
        return max(self.gather_objects(value))

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' ``rows`` (n, ...), in the order of ranks: (size n, ...). n is equal everywhere."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def local(self, rows: Tensor) -> Tensor:
        """This process's part of what :meth:`gather` returned. No other process is asked."""
        return rows.chunk(self.size)[self.rank] if self.size > 1 else rows

    def gather_objects(self, value: T) -> list[T]:
        """Every process's ``value``, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T) -> T:
        """The main process's ``value``."""
        if self.size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.gather_objects(None)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the block before the others: what it makes there, they find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


ALONE = World()
"""A run of one process."""


@contextlib.contextmanager
def joined(device: torch.device, *, group: bool = False) -> Iterator[World]:
    """The processes that a launcher started, of which this is one; it alone where none did.

    ``group`` makes torch's process group for one process as well, for what cannot do without. Raises
    PosttrainError where the environment does not say how the others are reached, or there are more
    processes than GPUs.
    """
    rank, size = place()
    if size == 1 and not group:
        yield ALONE
        return
    if dist.is_initialized():
        yield World(rank, size)
        return
    if size > 1 and (missing := [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]):
        raise PosttrainError(
            f"this is process {rank} of {size}, and {' and '.join(missing)} in the environment must say "
            "where the others are: start with --nproc, torchrun, accelerate launch or srun"
        )
    backend = "gloo"
    if device.type == "cuda":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here > torch.cuda.device_count():
            raise PosttrainError(f"{here} processes on this machine, but {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    where: dict[str, Any] = {} if size > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=PATIENCE, **where)
    try:
        yield World(rank, size)
    finally:
        # DeepSpeed, where it is in use, keeps references of its own, and would take them for the next run's
        own = getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None)
        (sys.modules["deepspeed.comm"] if own is not None else dist).destroy_process_group()
