"""Defines ``posttrain schema``, which gives editors the JSON Schema of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.options import DebugOption, terminal


def show_schema(
    output: Annotated[
        Path | None, typer.Option(help="The file to write, such as recipe.schema.json. Default: print it.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Print or write the JSON Schema of a recipe, for editors that complete and check YAML.

    Types of installed plug-ins are included. With --output it also prints the line that a recipe begins with
    to be checked by the file.
    """
    del debug
    from posttrain.recipe.json_schema import json_schema
    from posttrain.support.files import write

    text = json.dumps(json_schema(), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    write(output, text)
    line = f"# yaml-language-server: $schema={output.absolute().as_posix()}"
    terminal().print(f"wrote {output}; a recipe that begins with this line is checked by it:", soft_wrap=True)
    terminal().print(line, soft_wrap=True)
