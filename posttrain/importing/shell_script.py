"""Reads a shell script: the variables that it sets, and its one training command. Nothing of it is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from posttrain.errors import PosttrainError
from posttrain.importing.command_line import ASSIGNMENT, CommandLine, parsed, refuse_unset, script_at

_ADDED = re.compile(r"[A-Za-z_]\w*\+=")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_LEFT_OUT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|(?<!\S)(?:\#.*|\d+(?=[<>]))""", re.X)
"""A quoted text, which stays; or a comment or the number of a redirected stream, which do not."""
_OPENS, _CLOSES = ("if", "for", "while", "until", "case", "select"), ("fi", "done", "esac")
_BEFORE = ("then", "do", "else", "export")
"""Words after which a command begins."""


def read_script(text: str, file: str, trainer: str, scripts: re.Pattern[str]) -> CommandLine:
    """The command of a shell script that starts a training script of ``scripts``; without one, the script's
    variables alone. Raises PosttrainError if there are several."""
    variables: dict[str, str] = {}
    found: list[list[str]] = []
    depth = 0
    for number, line in enumerate(text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines(), 1):
        where = f"{file}: command {number}"
        try:
            words = _words(line)
        except ValueError as error:
            raise PosttrainError(f"{where} cannot be read: {error}") from None
        for command in _commands(words):
            command, depth = _assigned(command, variables, depth, where)
            at = script_at(command, scripts)
            if at is not None and scripts.match(" ".join(command[at:])):
                found.append(command)
    if not found:
        return CommandLine([], variables=variables)
    if len(found) > 1:
        raise PosttrainError(
            f"{file} has {len(found)} commands of {trainer}: give one of them after --, in place of the file"
        )
    for word in found[0]:
        refuse_unset(word, f"{file}: {word!r}")
    return replace(parsed(found[0], scripts), variables=variables)


def _words(line: str) -> list[str]:
    """The words of a line. Separators and redirections are words of their own. Raises ValueError."""
    lexer = shlex.shlex(_LEFT_OUT.sub(lambda m: m[1] or "", line), posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    return list(lexer)


def _commands(words: Sequence[str]) -> Iterator[list[str]]:
    """The commands of a line, without where they write to and read from."""
    command: list[str] = []
    redirected = False
    for word in words:
        if redirected:
            redirected = False
        elif word and set(word) <= {*";|&"}:
            yield command
            command = []
        elif word and set(word) <= {*"<>|&"}:
            redirected = True
        else:
            command.append(word)
    yield command


def _assigned(
    command: Sequence[str], variables: dict[str, str], depth: int, where: str
) -> tuple[list[str], int]:
    """Set the ``variables`` that ``command`` begins with; returns its other words, and how many ``if``, loops
    and the like are open after it, with ``depth`` open before.

    Raises PosttrainError for an assignment inside one, whose value is not known, and for ``+=``.
    """
    for i, word in enumerate(command):
        if word in _OPENS or word in _CLOSES:
            return [*command[i + 1 :]], max(depth + (1 if word in _OPENS else -1), 0)
        if _ADDED.match(word):
            raise PosttrainError(f"{where}: {word!r} adds to a variable: write its whole value")
        if found := ASSIGNMENT.fullmatch(word):
            if depth:
                raise PosttrainError(
                    f"{where}: {word!r} is set under a condition or in a loop, which is not read: give the "
                    "flags themselves after --, in place of the file"
                )
            variables[found[1]] = _filled(found[2], variables)
        elif word not in _BEFORE:
            return [_filled(word, variables) for word in command[i:]], depth
    return [], depth


def _filled(word: str, variables: Mapping[str, str]) -> str:
    """``word`` with the variables that the script has set, or their ``${NAME:-default}``; others stay as they
    are written."""
    return _VARIABLE.sub(lambda m: variables.get(m[1] or m[3], m[0] if m[2] is None else m[2]), word)
