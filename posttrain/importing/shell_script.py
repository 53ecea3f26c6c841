"""Reads a shell script: the variables that it sets, and its one training command. Nothing of it is run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from posttrain.errors import PosttrainError
from posttrain.importing.command_line import ASSIGNMENT, CommandLine, parsed, refuse_unset, script_at

_ADDED = re.compile(r"[A-Za-z_]\w*\+=")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?:(:?-)((?:[^{}]|\{[^{}]*\})*))?\}|(\w+))")
_OUTPUT = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`")
"""What a command prints, which is not known."""
_HERE = re.compile(r"""(?<!<)<<-?\s*(["']?)([A-Za-z_]\w*)\1""")
_LEFT_OUT = re.compile(r"""("(?:\\.|[^"\\])*"|'[^']*')|(?<!\S)(?:\#.*|\d+(?=[<>]))|(\$)""", re.X)
"""A quoted text, which stays; a comment or the number of a redirected stream, which do not; a bare ``$``."""
_BARE = "\0"
"""Stands before a ``$`` outside quotes: spaces in its value separate words."""
_OPENS, _CLOSES = ("if", "for", "while", "until", "case", "select"), ("fi", "done", "esac")
_BEFORE = ("then", "do", "else", "{", "export", "readonly", "local", "declare", "typeset")
"""Words after which a command or an assignment begins."""
_TESTS = ("[", "[[", "test")


def read_script(text: str, file: str, trainer: str, scripts: re.Pattern[str]) -> CommandLine:
    """The command of a shell script that starts a training script of ``scripts``; without one, the script's
    variables alone. Raises PosttrainError if there are several."""
    variables: dict[str, str] = {}
    found: list[list[str]] = []
    depth = 0
    for number, line in enumerate(_lines(text), 1):
        where = f"{file}: command {number}"
        try:
            words = _words(line)
        except ValueError as error:
            raise PosttrainError(f"{where} cannot be read: {error}") from None
        for command, tested in _commands(words):
            command, depth = _assigned(command, variables, depth, where, tested=tested)
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


def _lines(text: str) -> Iterator[str]:
    """The lines of a script, continued ones joined, without here-documents and lines that are comments."""
    begun, end = "", ""
    for line in text.splitlines():
        if end:
            end = "" if line.strip() == end else end
            continue
        if line.lstrip().startswith("#"):
            line = ""  # a backslash at the end of a comment continues nothing
        if line.endswith("\\"):
            begun += f"{line[:-1]} "
            continue
        yield begun + line
        end = here[2] if (here := _HERE.search(_OUTPUT.sub("", begun + line))) else ""
        begun = ""
    yield begun


def _words(line: str) -> list[str]:
    """The words of a line. Separators and redirections are words of their own. Raises ValueError."""
    line = _LEFT_OUT.sub(lambda m: m[1] or (_BARE + m[2] if m[2] else ""), _OUTPUT.sub("$(...)", line))
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    return list(lexer)


def _commands(words: Sequence[str]) -> Iterator[tuple[list[str], bool]]:
    """The commands of a line, without where they write to and read from, and whether each runs only if a test
    or the command before says so."""
    command: list[str] = []
    redirected = tested = False
    for word in words:
        if redirected:
            redirected = False
        elif word and set(word) <= {*";|&"}:
            yield command, tested
            tested = word == "||" or (word == "&&" and (tested or command[:1] in [[t] for t in _TESTS]))
            command = []
        elif word and set(word) <= {*"<>|&"}:
            redirected = True
        else:
            command.append(word)
    yield command, tested


def _assigned(
    command: Sequence[str], variables: dict[str, str], depth: int, where: str, *, tested: bool
) -> tuple[list[str], int]:
    """Set the ``variables`` that ``command`` begins with; returns its other words, and how many ``if``, loops
    and the like are open after it, with ``depth`` open before.

    Raises PosttrainError for an assignment inside one or after a test, whose value is not known, and for
    ``+=``.
    """
    for i, word in enumerate(command):
        if word in _OPENS or word in _CLOSES:
            if word == "for":
                variables.pop("".join(command[i + 1 : i + 2]), None)
            return _filled_words(command[i + 1 :], variables), max(depth + (1 if word in _OPENS else -1), 0)
        if _ADDED.match(word):
            raise PosttrainError(f"{where}: {_plain(word)!r} adds to a variable: write its whole value")
        if found := ASSIGNMENT.fullmatch(word):
            if depth or tested:
                raise PosttrainError(
                    f"{where}: {_plain(word)!r} is set under a condition or in a loop, which is not read: "
                    "give the flags themselves after --, in place of the file"
                )
            variables[found[1]] = _plain(_filled(found[2], variables))
        elif word not in _BEFORE and (not word.endswith(")") or "$" in word):  # of a case, or of a function
            return _filled_words(command[i:], variables), depth
    return [], depth


def _filled_words(words: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """``words`` with the script's variables, as the shell makes words of them. ``$@`` is nothing: a script is
    read as it is without arguments."""
    found: list[str] = []
    for word in words:
        if _plain(word) not in ("$@", "$*", "${@}"):
            filled = _filled(word, variables)
            found += _plain(filled).split() if _BARE in filled else [filled]
    return found


def _filled(word: str, variables: Mapping[str, str]) -> str:
    """``word`` with the variables that the script has set, or their ``${NAME:-default}``; others stay as they
    are written."""

    def value(found: re.Match[str]) -> str:
        name, mark, default, bare = found.groups()
        kept = variables.get(name or bare)
        if mark and (kept is None or (mark == ":-" and not kept)):
            return _filled(default, variables)
        return found[0] if kept is None else kept

    return _VARIABLE.sub(value, word)


def _plain(word: str) -> str:
    return word.replace(_BARE, "")
