"""Holds what a run of a recipe runs with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.recipe.schema import Recipe
from posttrain.support.terminal import note

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from posttrain.distributed.world import World
    from posttrain.model import Model


@dataclass(frozen=True)
class Run:
    """One run of a recipe, as one of its processes sees it."""

    recipe: Recipe
    spec: Model
    """The recipe's model, with the files that it generates in place."""
    folder: Path
    """``runs/NAME``."""
    device: torch.device
    console: Console
    world: World

    def note(self, line: str) -> None:
        """Tell the user something."""
        note(self.console, line)
