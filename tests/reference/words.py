"""Turns docstrings and defaults of the code into Markdown."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

WIDTH = 128
NOTE = "<!-- Made from the code by `python tests/reference`: change the code's docstrings, not this page. -->"


def markdown(text: str | None) -> str:
    """A docstring in Markdown, its paragraphs and lists kept: roles of Sphinx become code."""
    text = inspect.cleandoc(text or "")
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{_short(found[1])}`", text)
    return text.replace("``", "`").replace("::\n", ":\n")


def one_line(text: str | None) -> str:
    """The same in one line, as a cell of a table takes it."""
    return " ".join(markdown(text).split()).replace("|", "\\|")


def wrapped(text: str) -> str:
    """The paragraphs and list items of ``text`` in lines that a page allows; headings, comments and indented
    blocks stay."""
    return "\n\n".join(_filled(paragraph) for paragraph in re.split(r"\n\s*\n", text.strip("\n")))


def _filled(paragraph: str) -> str:
    parts: list[str] = []
    for line in paragraph.splitlines():
        if (
            line.startswith(("- ", "#", "<!--", "    "))
            or not parts
            or parts[-1].startswith(("#", "<!--", "    "))
        ):
            parts.append(line.rstrip())
        else:
            parts[-1] += f" {line.strip()}"
    return "\n".join(part if part.startswith(("#", "<!--", "    ")) else _fill(part) for part in parts)


def _fill(part: str) -> str:
    """``part``, a paragraph or an item, in lines of which none begins with a sign that would make it a list."""
    glued = re.sub(r"(?<=\S) ([-+*]) ", r"\0\1 ", " ".join(part.split()))
    indent = "  " if part.startswith("- ") else ""
    filled = textwrap.fill(
        glued, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return filled.replace("\0", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines) + "\n"


def value(default: Any) -> str:
    """A default as YAML writes it, in code."""
    return f"`{_yaml(default)}`"


def joined(words: Sequence[str]) -> str:
    """``a``, ``b`` or ``c``."""
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def number(found: float) -> str:
    """A number as a recipe writes it: 2e-5, 50000, 0.02."""
    if isinstance(found, int) and abs(found) < 1e9:
        return str(found)
    text = f"{found:g}" if 1e-3 <= abs(found) < 1e6 or found == 0 else f"{found:e}"
    return re.sub(r"\.?0*e([+-])0*(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", text)


def _yaml(default: Any) -> str:
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int | float):
        return number(default)
    if isinstance(default, list):
        return f"[{', '.join(map(_yaml, default))}]"
    if isinstance(default, dict):
        return f"{{{', '.join(f'{name}: {_yaml(each)}' for name, each in default.items())}}}"
    return str(default)


def _short(name: str) -> str:
    """``Class.member`` or the last name of a dotted path."""
    parts = name.split(".")
    classes = [i for i, part in enumerate(parts) if part[:1].isupper()]
    return ".".join(parts[classes[0] if classes else -1 :])
