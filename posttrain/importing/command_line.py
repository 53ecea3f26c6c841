"""Takes a training command apart: launcher, training script, flags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.errors import PosttrainError
from posttrain.importing.flags import BARE

NUMBER = re.compile(r"-?\.?\d")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_UNSET = re.compile(r"\$[\w{@(*]")
_COUNTED = ("num_processes", "nproc_per_node", "nnodes", "num_machines")
_MODULE = ("m", "module")


@dataclass(frozen=True)
class CommandLine:
    """A training command, taken apart."""

    flags: Sequence[tuple[str, object]]
    """The training script's flags, without dashes, and their values."""
    words: Sequence[str] = ()
    """Words after the script that are no flags and no values, such as the file of ``ff-train FILE``."""
    script: str = ""
    """The training script, module or program; empty if only flags were given."""
    processes: int | None = None
    """Processes of the launcher, over all machines; None if it does not say."""
    launcher: Mapping[str, object] = field(default_factory=dict)
    """The launcher's options, but for numbers of processes and machines."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Shell variables that are set for the command."""


def parsed(words: Sequence[str], scripts: re.Pattern[str]) -> CommandLine:
    """``words``, of which those before a script of ``scripts`` are the launcher's. Raises PosttrainError."""
    at = script_at(words, scripts)
    options, others = _flags(words[: at or 0])
    flags, alone = _flags(words if at is None else words[at + 1 :])
    plain = {name.replace("-", "_"): value for name, value in options}
    return CommandLine(
        flags,
        alone,
        "" if at is None else words[at],
        _count(plain),
        {name: v for name, v in options if name.replace("-", "_") not in (*_COUNTED, *_MODULE)},
        {found[1]: found[2] for word in others if (found := ASSIGNMENT.fullmatch(word))},
    )


def script_at(words: Sequence[str], scripts: re.Pattern[str]) -> int | None:
    """Where the training script stands in a command: the first word that ``scripts`` matches, that follows
    ``-m``, or that ends in .py. None if ``words`` are flags alone."""
    if not words or words[0].startswith("-"):
        return None
    for i, word in enumerate(words):
        module = i > 0 and words[i - 1].lstrip("-") in _MODULE and words[i - 1].startswith("-")
        if word.startswith("-") or (module and word.startswith(("torch.", "accelerate."))):
            continue
        if module or word.endswith(".py") or scripts.match(" ".join(words[i:])):
            return i
    return None


def refuse_unset(value: str, what: str) -> None:
    """Raise PosttrainError, which begins with ``what``, if ``value`` still has a variable of the shell or the
    output of a command."""
    if found := _UNSET.search(value):
        kind = "the output of a command" if found[0] == "$(" else "a variable that the script does not set"
        raise PosttrainError(f"{what} has {kind}: write its value")


def _flags(words: Sequence[str]) -> tuple[list[tuple[str, object]], list[str]]:
    """The flags in ``words`` with their values, and the words that are neither."""
    flags: list[tuple[str, object]] = []
    alone: list[str] = []
    waiting = False
    for word in words:
        if word.startswith("-") and not NUMBER.match(word):
            name, equals, value = word.lstrip("-").partition("=")
            flags.append((name, value if equals else BARE))
            waiting = not equals
        elif waiting:
            flags[-1] = (flags[-1][0], word)
            waiting = False
        else:
            alone.append(word)
    return flags, alone


def _count(launcher: Mapping[str, object]) -> int | None:
    """Processes over all machines, by the options of torchrun or of accelerate launch."""

    def number(name: str) -> int | None:
        value = str(launcher.get(name, ""))
        return int(value) if value.isascii() and value.isdigit() and int(value) else None

    if (total := number("num_processes")) is not None:
        return total
    if (each := number("nproc_per_node")) is None:
        return None
    if ":" in (nodes := str(launcher.get("nnodes", "1"))):
        raise PosttrainError(f"--nnodes {nodes} is a range: say how many machines there are")
    return each * (number("nnodes") or 1)
