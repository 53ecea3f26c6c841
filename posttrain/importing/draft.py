"""A recipe that is being written: its fields, the flags that each came from, and what got lost on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.importing.flags import BARE, Settings
from posttrain.support.display import shown

TOP = ("name", "seed", "device", "tf32", "parallel", "tracker", "model", "cache", "stages", "evaluation")
STAGE = ("name", "start_from", "tune", "algorithm", "data", "rewards", "reference", "train", "monitor")
COLUMN = 34
"""Where comments begin."""
_PLAIN = re.compile(r"[A-Za-z_/][\w./+:-]*", re.ASCII)
_WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")
_KEY = re.compile(r"[A-Za-z_][\w.-]*")


@dataclass(frozen=True)
class Leaf:
    """A field's value, and the comment beside it."""

    value: Any
    comment: str


class Draft:
    """The fields of a recipe with one stage, and the account of the flags they were made from."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.top: dict[str, Any] = {}
        self.stage: dict[str, Any] = {}
        self.fields: dict[str, list[str]] = {}
        """Flag -> the fields that came from it."""
        self.idle: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        """Flag -> what comes nearest. One that was not given is told as a default of the trainer."""
        self.differs: list[str] = []
        self.more_idle: list[tuple[str, str]] = []
        self.more_lost: list[tuple[str, str]] = []
        """What is told of things that are no flags of the trainer: the launcher's, or a data set's keys."""

    def put(self, path: str, value: Any, *flags: str, note: str = "") -> None:
        """Set a field; ``stage.`` in front means the stage. ``flags`` are those that it came from, ``note``
        is for the reader of the recipe."""
        for name in flags:
            if name in self.settings:
                self.fields.setdefault(name, []).append(path.replace("stage.", "stages.0."))
        given = ", ".join(self.settings.spelled(n) for n in flags if n in self.settings)
        others = ", ".join(self.settings.spelled(n) for n in flags if n not in self.settings)
        defaults = f"default of {others}" if others else ""
        comment = "; ".join(part for part in (given, defaults, note) if part)
        parts = path.split(".")
        block = self.stage if parts[0] == "stage" else self.top
        for part in parts[1 if parts[0] == "stage" else 0 : -1]:
            block = block.setdefault(part, {})
        block[parts[-1]] = Leaf(value, comment)

    def same(self, fields: Mapping[str, str | Sequence[str]]) -> None:
        """Set each of ``fields``, field -> flag, to the value of its flag; a list, if it has several."""
        for path, flag in fields.items():
            if isinstance(flag, str):
                self.put(path, self.settings[flag], flag)
            else:
                self.put(path, [self.settings[name] for name in flag], *flag)

    def either(self, path: str, flag: str, on: str, off: str) -> None:
        """Set a field to ``on`` if the flag is on, else to ``off``."""
        self.put(path, on if self.settings[flag] else off, flag)

    def near(self, path: str, value: Any, flag: str, words: str) -> None:
        """Set a field to what comes nearest to a flag's value; ``words`` say what differs."""
        self.put(path, value, flag, note="the nearest")
        self.lost[flag] = words

    def yaml(self, heading: str) -> str:
        """The recipe, with ``heading`` as a comment in front."""
        lines = [f"# {line}" for line in heading.splitlines()]
        for key in sorted(self.top, key=TOP.index):
            lines += _lines(key, self.top[key], "")
            if key == "model":
                lines += ["stages:", *self._stage_lines()]
        return "\n".join(lines) + "\n"

    def _stage_lines(self) -> list[str]:
        inner: list[str] = []
        for key in sorted(self.stage, key=STAGE.index):
            inner += _lines(key, self.stage[key], "    ")
        return ["  - " + inner[0][4:], *inner[1:]]


def _lines(key: str, node: Any, indent: str) -> list[str]:
    if isinstance(node, Leaf):
        line = f"{indent}{_key(key)}: {text_of(node.value)}"
        comment = shown(" ".join(node.comment.split()))
        return [f"{line.ljust(COLUMN)}  # {comment}" if comment else line]
    lines = [f"{indent}{_key(key)}:"]
    for inner, value in node.items():
        lines += _lines(inner, value, indent + "  ")
    return lines


def text_of(value: Any) -> str:
    """``value`` as YAML on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)}: {text_of(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(text_of, value)) + "]"
    text = str(value)
    plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not text.endswith(":")
    return text if plain else _quoted(text)


def _number(value: float) -> str:
    """A float in the fewest digits that read as the same number, with an exponent below a hundredth."""
    if value and abs(value) < 0.01:
        digits = next(text for n in range(17) if float(text := f"{value:.{n}e}") == value)
        mantissa, _, exponent = digits.partition("e")
        return f"{mantissa}e{int(exponent)}"
    return repr(value)


def _quoted(text: str) -> str:
    """``text`` in double quotes, with what YAML takes for no character escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def _key(key: object) -> str:
    text = str(key)
    return text if _KEY.fullmatch(text) and text.lower() not in _WORDS else text_of(text)


def value_of(value: Any) -> str:
    """A flag's value, for the report."""
    if value is BARE or value is True:
        return ""
    text = text_of(value)
    return f" {text if len(text) <= 60 else text[:57] + '...'}"
