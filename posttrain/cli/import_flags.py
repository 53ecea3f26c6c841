"""Defines ``posttrain import-flags``, which translates another trainer's settings into a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.options import DebugOption

if TYPE_CHECKING:
    from posttrain.importing.trainers import Translation


def import_flags(
    trainer: Annotated[
        str,
        typer.Argument(
            metavar="TRAINER", help="hy-soar, flow-grpo, diffusion-nft, flow-factory or simpletuner."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE] [-- FLAGS...]",
            help="Its script, configuration file or FILE.py:NAME, then after -- its flags or whole command.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The recipe to write. Default: print it.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Number of its processes, if the words do not say."),
    ] = None,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Leave unknown flags out, and list them.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Translate another trainer's command line or configuration into a recipe.

    A comment on each field names the flag that it comes from. Listed beside it: flags that are not needed,
    flags without counterpart and what comes nearest, and what behaves differently.
    """
    del debug
    from posttrain.errors import PosttrainError
    from posttrain.importing.trainers import trainer_named, translate
    from posttrain.support.files import write

    if output is not None and output.exists():
        raise PosttrainError(f"{str(output)!r} exists: give another --output")
    title = trainer_named(trainer).title
    if not words:
        raise PosttrainError(f"give a file of {title}'s, or its flags after --")
    found = translate(trainer, words, processes, lenient=ignore_unknown)
    _report(title, found)
    if output is None:
        typer.echo(found.text, nl=False)
    else:
        write(output, found.text)
        _say(f"wrote {output}; next: posttrain check {output}", "")


def _report(title: str, found: Translation) -> None:
    count = len(found.translated)
    _say(f"{title}: {count} flags translated", "bold")
    for heading, pairs in (
        ("not needed:", found.idle),
        ("without counterpart:", found.lost),
    ):
        _list(heading, [f"{flag}: {words}" for flag, words in pairs])
    _list("unknown, left out:", found.unknown)
    _list("behaves differently:", found.differs)
    _list("missing here, to be given before it runs:", found.yours)


def _list(heading: str, lines: Sequence[str]) -> None:
    if lines:
        _say(heading, "bold")
    for line in lines:
        _say(f"  {line}", "")


def _say(line: str, style: str) -> None:
    from posttrain.support.terminal import Terminal

    Terminal(stderr=True).print(line, style=style, soft_wrap=True)
