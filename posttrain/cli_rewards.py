"""The commands about rewards: ``posttrain rewards | score | serve-reward``."""

from __future__ import annotations

from typing import Annotated

import typer

rewards_app = typer.Typer(
    help="List the rewards with what they need, or fetch their weights.", no_args_is_help=False
)
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(rewards_app, name="rewards")


@rewards_app.callback(invoke_without_command=True)
def rewards_list(context: typer.Context) -> None:
    """List the rewards: range, weights, licence, and whether all that they need is here."""
    if context.invoked_subcommand is not None:
        return
    from posttrain.catalogue import table

    _console().print(table())


@rewards_app.command("fetch")
def rewards_fetch(
    name: Annotated[str, typer.Argument(help="A reward's name, as 'posttrain rewards' lists it.")],
    debug: DebugOption = False,
) -> None:
    """Download a reward's weights into the hub's cache, going on where it was cut off, and check their hashes."""
    del debug
    from posttrain.catalogue import fetch

    for source, path in fetch(name):
        _console().print(
            f"{source.repo} ({source.weights.licence}): complete and as published, in {path}",
            highlight=False,
            soft_wrap=True,
        )


def _console():
    from rich.console import Console

    return Console()
