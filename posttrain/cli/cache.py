"""Defines ``posttrain cache``, which shows or clears the cached encodings of prompts and images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import DebugOption, terminal

cache_app = typer.Typer(
    help="Show or clear the cached encodings of prompts and images.", no_args_is_help=False
)
PathOption = Annotated[Path | None, typer.Option(help="The cache's folder, if a recipe sets cache.path.")]


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(cache_app, name="cache")


@cache_app.callback(invoke_without_command=True)
def cache_list(context: typer.Context, path: PathOption = None) -> None:
    """Show what is cached, its size, and when it was last used."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from posttrain.cache.contents import age, contents
    from posttrain.support.wording import short

    stores = contents(root := _root(path))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("store", "dtype", "device", "size", "used"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for kept in stores:
        device = str(kept.about.get("numerics", {}).get("device", "?"))
        dtype = str(kept.about.get("dtype", "?"))
        table.add_row(kept.folder.name, dtype, device, short(kept.size, "B"), age(kept.used))
    if stores:
        terminal().print(table)
    total = short(sum(kept.size for kept in stores), "B")
    terminal().print(f"{total} in {root}", soft_wrap=True, highlight=False, markup=False)


@cache_app.command("clear")
def cache_clear(path: PathOption = None, debug: DebugOption = False) -> None:
    """Remove all cached encodings. Runs encode again what they need."""
    del debug
    from posttrain.cache.contents import clear
    from posttrain.support.wording import short

    freed = short(clear(root := _root(path)), "B")
    terminal().print(f"removed {freed} from {root}", soft_wrap=True, highlight=False, markup=False)


def _root(path: Path | None) -> Path:
    from posttrain.cache.settings import default_folder

    return default_folder() if path is None else path.expanduser().absolute()
