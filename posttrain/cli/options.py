"""Options that several commands have, and the console that they print on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or a shipped recipe's name.")
]
BaseOption = Annotated[str | None, typer.Option(help="The model a LoRA belongs to, if not the one it names.")]


def terminal() -> Console:
    """What commands print on; rich is only imported by those that print."""
    from rich.console import Console

    return Console()
