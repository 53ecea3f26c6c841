"""One process: everything is whole and here."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from posttrain.layout import Layout
from posttrain.optimizers import optimizer_of
from posttrain.parallel.strategy import Direct, Parallel, Strategy
from posttrain.parallel.world import World

if TYPE_CHECKING:
    from posttrain.policy import Policy
    from posttrain.train_settings import Train


class Single(Parallel):
    """One process."""

    strategy: Literal["single"] = "single"

    def problem(self, processes: int) -> str | None:
        return f"single is one process, not {processes}" if processes > 1 else None

    def prepare(self, policy: Policy, settings: Train, world: World) -> Strategy:
        return Alone(policy, world, Layout(), optimizer_of(settings, policy.trained.values()))


class Alone(Direct):
    """The strategy of :class:`Single`."""

    repeatable: ClassVar = True
