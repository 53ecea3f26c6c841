"""Reads what a user gives of another trainer, a file, flags or a command, as the trainer's settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.command_line import CommandLine, parsed
from posttrain.importing.config_file import ConfigFile
from posttrain.importing.flags import BARE, Settings
from posttrain.importing.shell_script import read_script
from posttrain.importing.trainer import Start, Trainer
from posttrain.recipe.positions import read_file
from posttrain.support.spelling import meant

_PYTHON = re.compile(r"\.py(:\w+)?$")
_SHELL = {".sh", ".bash", ".txt"}
_OTHERS = {".yaml", ".yml", ".json", ".env", ".toml", ".ini"}


def read(
    trainer: Trainer, settings: Settings, words: Sequence[str], processes: int | None
) -> tuple[Start, Mapping[str, object]]:
    """Give the ``settings`` the values of ``words``; returns how the training is started, and the launcher's
    options. ``processes`` is what the user says of their number. Raises PosttrainError."""
    file, rest = _file_and_flags(words)
    config = file is not None and _PYTHON.search(file.name) is not None
    if file is not None and (not trainer.published if config else file.suffix in _OTHERS - {*trainer.files}):
        raise _unread(trainer, file)
    command, given = parsed(rest, trainer.scripts), file
    if file is not None and not config and file.suffix not in trainer.files:
        command, file = _of_script(trainer, file, command)
    command, file = trainer.opened(command, file)
    if command.words:
        raise PosttrainError(f"{trainer.title}: {command.words[0]!r} is neither a flag nor the value of one")
    if file is not None and not config:
        if file.suffix not in trainer.files:
            raise _unread(trainer, file)
        give(settings, trainer.files[file.suffix](read_file(file), str(file)))
    gpus, flags = None, command.flags
    if trainer.published:
        gpus, flags = _configured(trainer, settings, file, flags)
    give(settings, flags)
    own = settings["num_processes"] if "num_processes" in trainer.table else gpus
    counted = _processes(processes, command.processes, settings.given.get("num_processes"))
    return Start(command.script, counted or own, file or given), command.launcher


def give(settings: Settings, pairs: Iterable[tuple[str, Any]]) -> None:
    """Give ``settings`` the values of ``pairs``. Raises PosttrainError."""
    for name, value in pairs:
        settings.give(str(name), value)


def _processes(said: int | None, launcher: int | None, own: int | None) -> int | None:
    """The number of processes by the user or the launcher. Raises PosttrainError if they contradict each
    other, or the launcher the configuration's ``own`` number."""
    if said and launcher and said != launcher:
        raise PosttrainError(f"--processes {said}, but its launcher starts {launcher}: leave one out")
    if launcher and own and launcher != own and not said:
        raise PosttrainError(
            f"the launcher starts {launcher} processes, but num_processes is {own}: leave one out, or say "
            "how many there are with --processes"
        )
    return said or launcher


def _unread(trainer: Trainer, file: Path) -> PosttrainError:
    return PosttrainError(f"{trainer.title} has no {file.suffix} file that import-flags reads: {str(file)!r}")


def _of_script(trainer: Trainer, file: Path, command: CommandLine) -> tuple[CommandLine, Path | None]:
    """The command that a shell script holds, with the flags of ``command`` after it. A script that only sets
    variables may be a configuration. Raises PosttrainError if it is neither."""
    script = read_script(read_file(file), str(file), trainer.title, trainer.scripts)
    if not script.script:
        if ".env" not in trainer.files:
            raise PosttrainError(f"{file} has no command of {trainer.title}")
        script = replace(script, flags=[*trainer.files[".env"](read_file(file), str(file))], variables={})
    return (
        CommandLine(
            [*script.flags, *command.flags],
            [*script.words, *command.words],
            command.script or script.script,
            command.processes or script.processes,
            {**script.launcher, **command.launcher},
            script.variables,
        ),
        None,
    )


def _configured(
    trainer: Trainer, settings: Settings, file: Path | None, pairs: Sequence[tuple[str, object]]
) -> tuple[int | None, list[tuple[str, object]]]:
    """Read the configuration ``FILE.py:NAME``; returns its number of GPUs, and the flags that override it."""
    places = [value for name, value in pairs if name == "config"]
    if BARE in places:
        raise PosttrainError(f"{trainer.title}: --config needs a value, such as config/grpo.py:NAME")
    if file is not None and places:
        raise PosttrainError(f"{trainer.title}: give {str(file)!r} or --config, not both")
    overrides = [(name.removeprefix("config."), value) for name, value in pairs if name != "config"]
    if file is None and not places:
        if not overrides:
            raise PosttrainError(f"{trainer.title}: give its configuration, such as config/grpo.py:NAME")
        return None, overrides
    place = str(file or places[-1])
    path, _, name = place.rpartition(":") if ":" in place else (place, "", "")
    if Path(path).is_file():
        config = ConfigFile(Path(path))
        for key, value in config.values(name).items():
            own = key in config.set or not config.base
            (settings.give if own else settings.default)(key, value)
        return config.gpus, overrides
    if name not in trainer.published:
        known = ", ".join(trainer.published)
        raise PosttrainError(
            f"no file {path!r}, and {name!r} is no configuration that {trainer.title} has published"
            f"{meant(name, trainer.published)}: {known}"
        )
    gpus, values = trainer.published[name]
    give(settings, values.items())
    return gpus, overrides


def _file_and_flags(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file that ``words`` begin with, if they do, and the others."""
    if not words or words[0].startswith("-"):
        return None, list(words)
    first, there = Path(words[0]), Path(words[0]).is_file()
    if not (there or _PYTHON.search(first.name) or first.suffix in _SHELL | _OTHERS):
        return None, list(words)
    if not (there or _PYTHON.search(first.name)):
        raise PosttrainError(f"no file {words[0]!r}")
    return first, list(words[1:])
