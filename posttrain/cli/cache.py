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

    from posttrain.cache.contents import age, contents, kept_beside
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
    terminal().print(f"{total} in {root}", soft_wrap=True)
    for what, size in (kept_beside(root) if path is None else {}).items():
        terminal().print(f"{short(size, 'B')} beside them: {what}", soft_wrap=True)


@cache_app.command("clear")
def cache_clear(path: PathOption = None, debug: DebugOption = False) -> None:
    """Remove all cached encodings. Runs encode again what they need.

    Without --path it also removes what was read of large data sets, and what plans counted.
    """
    del debug
    from posttrain.cache.contents import clear, clear_beside
    from posttrain.support.wording import short

    freed = clear(root := _root(path)) + (clear_beside(root) if path is None else 0)
    terminal().print(f"removed {short(freed, 'B')} from {root}", soft_wrap=True)


def _root(path: Path | None) -> Path:
    from posttrain.cache.settings import default_folder
    from posttrain.errors import PosttrainError
    from posttrain.support.paths import expanded, is_file

    root = default_folder() if path is None else expanded(path).absolute()
    if is_file(root):
        raise PosttrainError(f"{str(root)!r} is a file; the cache is a folder")
    return root
