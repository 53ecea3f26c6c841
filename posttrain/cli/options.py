"""Holds the options that several commands share, and the console on which commands print."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.support.terminal import Terminal

MAX_SIDE, MAX_SEED = 16_384, 2**63 - 1
"""The largest side in pixels and the largest seed, as in a recipe."""

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file or the name of a shipped recipe.")
]
BaseOption = Annotated[
    str | None, typer.Option(help="Base model of a LoRA. Default: the one that the LoRA names.")
]


def number(value: float | None) -> float | None:
    """The value of an option. Refuses NaN, which is neither below a minimum nor above a maximum."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is no number")
    return value


def terminal() -> Terminal:
    """The console on which commands print. Only commands that print import rich."""
    from posttrain.support.terminal import Terminal

    return Terminal()
