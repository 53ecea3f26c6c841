"""Holds what a stage runs with: what it is given, and what is prepared for its training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.source import BatchSource
from posttrain.distributed.world import ALONE, World
from posttrain.engine.checkpoint_folder import CheckpointFolder
from posttrain.engine.modes import Mode
from posttrain.model import FlowModel
from posttrain.parallel.strategy import Strategy
from posttrain.policy.policy import Policy
from posttrain.stages.account import Account
from posttrain.stages.stage_state import Ended
from posttrain.support.terminal import note

if TYPE_CHECKING:
    from rich.console import Console

    from posttrain.recipe.schema import Recipe, Stage


@dataclass(frozen=True)
class StageRun:
    """One stage of a recipe, its model, and where its files and messages go."""

    recipe: Recipe
    stage: Stage
    model: FlowModel
    """Holds the weights that the stage starts from."""
    run_folder: Path
    """``runs/NAME``."""
    console: Console
    world: World = ALONE
    ended: Ended | None = None
    """How an alarm ended the stage before, if it is only to be published again."""

    @property
    def folder(self) -> Path:
        """The folder of this stage's files, ``runs/NAME/STAGE``."""
        return self.run_folder / self.stage.name

    def note(self, text: str) -> None:
        """Tell the user something that is as expected."""
        note(self.console, text)

    def warn(self, text: str) -> None:
        """Tell the user something to act on."""
        note(self.console, text, "yellow")


@dataclass(frozen=True)
class Training:
    """A stage that is ready to train."""

    run: StageRun
    policy: Policy
    strategy: Strategy
    source: BatchSource
    checkpoints: CheckpointFolder
    account: Account
    start: int
    """Optimizer steps that the checkpoint holds, from which training goes on; 0 without one."""
    mode: Mode | None
    """How forwards and backwards are computed; None where that is still to be found by trying."""
    search_micro_batch: bool
    """Whether ``policy.micro_batch`` is still to be found by trying."""

    def skipped(self) -> list[str]:
        """The images that any process has left out since the stage began, each with the reason. Every process
        calls it."""
        lists = self.run.world.gather_objects(self.source.skipped())
        return list(dict.fromkeys(chain(self.account.skipped, *lists)))
