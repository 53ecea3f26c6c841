"""Chooses the simplest strategy for the number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from posttrain.distributed.world import World
from posttrain.parallel.ddp import DDP
from posttrain.parallel.shares import Shares
from posttrain.parallel.single import Single
from posttrain.parallel.strategy import Parallel, Strategy

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy


class Auto(Parallel):
    """``single`` for one process, ``ddp`` for more."""

    strategy: Literal["auto"] = "auto"
    """The name by which recipes choose it."""

    def label(self, processes: int) -> str:
        return self.chosen(processes).label(processes)

    def shares(self, processes: int) -> Shares:
        return self.chosen(processes).shares(processes)

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        return self.chosen(world.size).prepare(policy, settings, world)

    def chosen(self, processes: int) -> Parallel:
        """The block that ``auto`` stands for, with that many processes."""
        return DDP() if processes > 1 else Single()
