"""Reads a command line, or the shell script that holds it: launcher, training script, flags, variables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from posttrain.errors import PosttrainError
from posttrain.importing.flags import BARE

NUMBER = re.compile(r"-?\.?\d")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_ADDED = re.compile(r"[A-Za-z_]\w*\+=")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_LEFT = re.compile(r"\$[\w{@(*]")
COUNTED = ("num_processes", "nproc_per_node", "nnodes", "num_machines")
"""Launcher options that say how many processes there are."""
_SEPARATORS = ("&&", "||", ";", "|", "&")
_OPENS, _CLOSES = ("if", "for", "while", "until", "case", "select"), ("fi", "done", "esac")


@dataclass(frozen=True)
class CommandLine:
    """A training command, taken apart."""

    flags: list[tuple[str, object]]
    """The training script's flags, without dashes, and their values."""
    script: str = ""
    """The training script or module; empty if only flags were given."""
    processes: int | None = None
    """Processes of the launcher, over all machines; None if it does not say."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Shell variables that a script sets."""
    launcher: Mapping[str, object] = field(default_factory=dict)
    """The launcher's options, but for numbers of processes and machines."""


def parsed(words: Sequence[str], trainer: str) -> CommandLine:
    """``words`` taken apart: those up to a script's name are the launcher's. Raises PosttrainError."""
    at = _script_at(words)
    launcher = dict(_flags(words[: at + 1 if at is not None else 0], trainer, strict=False))
    script = words[at] if at is not None else ""
    flags = _flags(words[at + 1 if at is not None else 0 :], trainer)
    others = {name: value for name, value in launcher.items() if name.replace("-", "_") not in COUNTED}
    return CommandLine(flags, script, _count(launcher), launcher=others)


def from_script(text: str, file: str, trainer: str, scripts: re.Pattern[str]) -> CommandLine:
    """The one command of a shell script that starts a training script of ``scripts``, or if it has none,
    its variables alone. Raises PosttrainError if there are several."""
    variables: dict[str, str] = {}
    commands: list[list[str]] = []
    depth = 0
    for number, line in enumerate(text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise PosttrainError(f"{file}: command {number} cannot be read: {error}") from None
        depth = _refuse_choices(words, depth, f"{file}: command {number}")
        words = [_filled(word, variables) for word in words if word != "export"]
        while words and (found := _ASSIGNMENT.fullmatch(words[0])):
            variables[found[1]] = found[2]
            words = words[1:]
        commands += [c for c in _split(words) if any(scripts.search(word) for word in c)]
    if len(commands) > 1:
        raise PosttrainError(
            f"{file} has {len(commands)} commands of {trainer}: give one of them after --, in "
            f"place of the file"
        )
    if not commands:
        return CommandLine([], variables=variables)
    for word in commands[0]:
        refuse_unset(word, f"{file}: {word!r}")
    found = parsed(commands[0], trainer)
    return replace(found, variables=variables)


def _split(words: Sequence[str]) -> list[list[str]]:
    commands: list[list[str]] = [[]]
    for word in words:
        if word in _SEPARATORS:
            commands.append([])
        else:
            commands[-1].append(word.removesuffix(";"))
    return commands


def _filled(word: str, variables: Mapping[str, str]) -> str:
    """``word`` with the variables that the script has set, or their ``${NAME:-default}``; others stay as they
    are written."""
    return _VARIABLE.sub(
        lambda m: variables.get(m[1] or m[3], m[0] if m[2] is None else m[2]),
        word,
    )


def refuse_unset(value: str, what: str) -> None:
    """Raise PosttrainError, which begins with ``what``, if ``value`` still has a variable of the shell."""
    if _LEFT.search(value):
        raise PosttrainError(f"{what} has a variable that the script does not set: write its value")


def _refuse_choices(words: Sequence[str], depth: int, where: str) -> int:
    """How many ``if``, loops and the like are open after ``words``, with ``depth`` open before.

    Raises PosttrainError for an assignment inside one, whose value is not known, and for ``+=``.
    """
    begins = True  # only at the beginning of a command is a word the shell's
    for full in words:
        word, begun = full.removesuffix(";"), begins
        begins = full.endswith(";") or full in (*_SEPARATORS, "then", "do", "else", "export")
        begins |= begun and _ASSIGNMENT.fullmatch(word) is not None
        if not begun:
            continue
        depth += (word in _OPENS) - (word in _CLOSES)
        if _ADDED.match(word):
            raise PosttrainError(f"{where}: {word!r} adds to a variable: write its whole value")
        if depth > 0 and _ASSIGNMENT.fullmatch(word):
            raise PosttrainError(
                f"{where}: {word!r} is set under a condition or in a loop, which is not read: give the flags "
                "themselves after --, in place of the file"
            )
    return max(depth, 0)


def _script_at(words: Sequence[str]) -> int | None:
    for i, word in enumerate(words):
        if word == "-m" and i + 1 < len(words) and not words[i + 1].startswith(("torch.", "accelerate.")):
            return i + 1
        if word.endswith(".py") and (
            i == 0 or not words[i - 1].startswith("--config") or "=" in words[i - 1]
        ):
            return i
    return None


def _flags(words: Sequence[str], trainer: str, *, strict: bool = True) -> list[tuple[str, object]]:
    flags: list[tuple[str, object]] = []
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("-") or NUMBER.match(word):
            if strict:
                raise PosttrainError(f"{trainer}: {word!r} belongs to no flag")
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if equals:
            flags.append((name, value))
        elif i < len(words) and (not words[i].startswith("-") or NUMBER.match(words[i])):
            flags.append((name, words[i]))
            i += 1
        else:
            flags.append((name, BARE))
    return flags


def _count(launcher: Mapping[str, object]) -> int | None:
    """Processes by the flags of torchrun or accelerate launch."""
    names = {name.replace("-", "_"): value for name, value in launcher.items()}

    def number(name: str) -> int | None:
        value = str(names.get(name, ""))
        return int(value) if value.isascii() and value.isdigit() and int(value) else None

    if (total := number("num_processes")) is not None:
        return total
    if (each := number("nproc_per_node")) is not None:
        nodes = str(names.get("nnodes", "1"))
        if ":" in nodes:
            raise PosttrainError(f"--nnodes {nodes} is a range: say how many machines there are")
        return each * (number("nnodes") or 1)
    return None
