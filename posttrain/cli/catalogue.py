"""Defines ``posttrain algorithms``, ``models`` and ``data``, which list what a recipe names by ``type``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.options import terminal

if TYPE_CHECKING:
    from posttrain.recipe.catalogue import Entry

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("algorithms")(list_algorithms)
    app.command("models")(list_models)
    app.command("data")(list_data)


def list_algorithms(as_json: JsonOption = False) -> None:
    """List the algorithms: what each does and needs, its papers, and the package it comes with."""
    from posttrain.recipe.catalogue import algorithms

    _show(algorithms(), as_json)


def list_models(as_json: JsonOption = False) -> None:
    """List the model families: what each is, what it can be used for, and the package it comes with."""
    from posttrain.recipe.catalogue import models

    _show(models(), as_json)


def list_data(as_json: JsonOption = False) -> None:
    """List the types of data: what each reads and gives, and the package it comes with."""
    from posttrain.recipe.catalogue import data

    _show(data(), as_json)


def _show(entries: Sequence[Entry], as_json: bool) -> None:
    from dataclasses import asdict

    from rich.text import Text

    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    width, console = max(len(entry.name) for entry in entries), terminal()
    for entry in entries:
        console.print(Text.assemble((f"{entry.name:<{width}}  ", "bold"), entry.summary), soft_wrap=True)
        facts = [entry.needs, *entry.papers, f"from {entry.package}"]
        console.print(Text(f"{'':<{width}}  {'; '.join(facts)}", "dim"), soft_wrap=True)
