"""The simplest strategy for as many processes as there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from posttrain.parallel.ddp import DDP
from posttrain.parallel.shares import Shares
from posttrain.parallel.single import Single
from posttrain.parallel.strategy import Parallel, Strategy
from posttrain.parallel.world import World

if TYPE_CHECKING:
    from posttrain.policy import Policy
    from posttrain.train_settings import Train


class Auto(Parallel):
    """``single`` for one process, ``ddp`` for more."""

    strategy: Literal["auto"] = "auto"

    def described(self, processes: int) -> str:
        return self.chosen(processes).described(processes)

    def shares(self, processes: int) -> Shares:
        return self.chosen(processes).shares(processes)

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        return self.chosen(world.size).prepare(policy, settings, world)

    def chosen(self, processes: int) -> Parallel:
        """What it stands for."""
        return DDP() if processes > 1 else Single()
