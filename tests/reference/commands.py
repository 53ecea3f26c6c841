"""Writes docs/reference-commands.md: every command of ``posttrain`` with its arguments and options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import typer.main
from words import NOTE, markdown, number, one_line, table, wrapped

from posttrain.cli.app import app

HEAD = f"""{NOTE}
# Command line

Every command, its arguments and its options, as `posttrain COMMAND --help` shows them. What to do with them: [Commands](commands.md).
Every command also has `--help` (`-h`). `--debug` shows the traceback of an error.
"""
ELSEWHERE = ("--help", "--debug")


def page() -> str:
    """The whole page."""
    root: Any = typer.main.get_command(app)
    return "\n".join([wrapped(HEAD) + "\n", *_commands(root, "posttrain", 2)]).rstrip() + "\n"


def _commands(command: Any, path: str, level: int) -> Iterator[str]:
    yield _one(command, path, level)
    for name in sorted(getattr(command, "commands", ())):
        yield from _commands(command.commands[name], f"{path} {name}", level + (path != "posttrain"))


def _one(command: Any, path: str, level: int) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.opts[0] not in ELSEWHERE]
    usage = [path, *(_named(a) for a in arguments)]
    usage += ["[OPTIONS]"] if options else []
    usage += ["[COMMAND]"] if getattr(command, "commands", ()) else []
    parts = [f"{'#' * level} {path}", wrapped(markdown(command.help)), f"```text\n{' '.join(usage)}\n```"]
    if arguments:
        rows = [(f"`{a.metavar or a.name.upper()}`", _default(a), one_line(a.help)) for a in arguments]
        parts.append(table(("argument", "default", "meaning"), rows))
    if options:
        rows = [(_option(o), _values(o), _default(o), one_line(o.help)) for o in options]
        parts.append(table(("option", "values", "default", "meaning"), rows))
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _named(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    return ", ".join(f"`{name}`" for name in names)


def _values(option: Any) -> str:
    if option.is_flag:
        return "flag"
    if option.metavar:
        return f"`{option.metavar}`"
    kind, bounds = _type(option), []
    for words, names in (("at least", "min"), ("at most", "max")):
        found = getattr(option, names, None)
        found = getattr(getattr(option, "type", None), names, None) if found is None else found
        bounds += [f"{words} {number(found)}"] if found is not None else []
    return ", ".join([kind, *bounds])


def _type(option: Any) -> str:
    """The kind of the option's value, in words. Typer tells it in one of two ways, by its version."""
    words = {
        "int": "whole number",
        "integer": "whole number",
        "float": "number",
        "str": "text",
        "path": "path",
    }
    if hasattr(option, "type_descriptor"):
        found = option.type_descriptor.annotation
        found = (get_args(found) or (found,))[0]
        name = found.__name__.lower()
    else:
        name = option.type.name.removesuffix(" range")
    return words.get(name, name)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "*required*"
    found = parameter.default
    if (
        found is None
        or found is False
        or callable(found)
        or found in ((), [])
        or type(found).__name__ == "Sentinel"
    ):
        return ""
    return f"`{number(found) if isinstance(found, int | float) else found}`"
