"""Another trainer, as import-flags knows it: its flags, its files, and what makes a recipe of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.importing.command_line import CommandLine
from posttrain.importing.draft import Draft
from posttrain.importing.flags import Flag, Settings
from posttrain.importing.published import Published


@dataclass(frozen=True)
class Start:
    """How a training is started, beyond its settings."""

    script: str = ""
    """The training script; empty if only flags were given."""
    processes: int | None = None
    """Processes over all machines; None if nothing says it."""
    file: Path | None = None
    """The file that was given, beside which others may lie."""


Opened = tuple[CommandLine, "Path | None"]
FileReader = Callable[[str, str], Iterable[tuple[str, Any]]]
"""(text, file name) -> the settings in it."""


def no_file(command: CommandLine, given: Path | None) -> Opened:
    """The ``command`` of a trainer whose commands name no file, and the file that was ``given``."""
    return command, given


@dataclass(frozen=True)
class Trainer:
    """Another trainer."""

    title: str
    prefix: str
    """What stands before a flag's name in messages."""
    scripts: re.Pattern[str]
    """The beginning of a command, from its training script on."""
    table: Mapping[str, Flag]
    build: Callable[[Settings, Draft, Start], None]
    """Writes the recipe of settings into the draft."""
    files: Mapping[str, FileReader] = field(default_factory=dict)
    """Ending of its configuration files -> what reads them."""
    opened: Callable[[CommandLine, Path | None], Opened] = no_file
    """(command, file that was given) -> the command without the file that it names, and the file to read."""
    published: Mapping[str, Published] = field(default_factory=dict)
    """Its configurations in Python that are known by name."""
