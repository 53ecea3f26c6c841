"""One process that holds everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.distributed.world import World
from posttrain.optim.optimizers import optimizer_of
from posttrain.parallel.strategy import Parallel, Strategy, TorchStrategy
from posttrain.policy.layout import Layout

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.policy.policy import Policy


class Single(Parallel):
    """One process."""

    strategy: Literal["single"] = "single"
    """The name by which recipes choose it."""

    def problem(self, processes: int) -> str | None:
        return f"single is one process, not {processes}" if processes > 1 else None

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        policy.lower()
        return Alone(policy, world, Layout(), optimizer_of(settings, policy.trained.values()))


class Alone(TorchStrategy):
    """The strategy of :class:`Single`."""

    repeatable: ClassVar = True
    tries_alone: ClassVar = True
