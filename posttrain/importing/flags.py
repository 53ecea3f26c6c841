"""What another trainer calls its settings: the table of its flags, and the values that a user gave them."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.errors import PosttrainError
from posttrain.support.spelling import meant
from posttrain.support.wording import shown

Kind = Literal["int", "float", "bool", "text", "list", "map", "any"]
WORDS: dict[Kind, str] = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "text": "a text",
    "list": "a list",
    "map": "a mapping such as {'pickscore': 1.0}",
    "any": "a value",
}
BARE = object()
"""The value of a flag that stands without one, such as ``--gradient_checkpointing``."""
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class Flag:
    """One setting of another trainer, as its published code reads it."""

    kind: Kind = "text"
    default: Any = None
    choices: tuple[str, ...] = ()
    idle: str = ""
    """Why it needs no field of a recipe."""
    nearest: str = ""
    """If posttrain has no counterpart: what comes nearest."""
    off: tuple[Any, ...] = (None, False, 0, "", "none", "no")
    """Values with which a flag without counterpart does nothing."""
    least: int | None = None
    """The least that a number may be."""

    @property
    def translated(self) -> bool:
        """Whether a field of the recipe comes from it."""
        return not (self.idle or self.nearest)


class Settings:
    """The flags of a trainer, with the values that were given, and the trainer's defaults for the others."""

    def __init__(self, trainer: str, prefix: str, table: Mapping[str, Flag]) -> None:
        self.trainer, self.prefix, self.table = trainer, prefix, table
        self.given: dict[str, Any] = {}
        self.defaults: dict[str, Any] = {}
        """What stands in for the table's defaults, such as the values of a user's ``base.py``."""
        self.unknown: dict[str, Any] = {}

    def give(self, name: str, value: Any) -> None:
        """Set a flag. Raises PosttrainError if it cannot have the value. An unknown one is kept aside."""
        if name in self.table:
            self.given[name] = self._read(name, value)
        else:
            self.unknown[name] = value

    def default(self, name: str, value: Any) -> None:
        """Let ``value`` be the default of a flag that is known."""
        if name in self.table:
            self.defaults[name] = self._read(name, value)

    def __getitem__(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        return self.defaults.get(name, self.table[name].default)

    def __contains__(self, name: str) -> bool:
        """Whether a value was given."""
        return name in self.given

    def spelled(self, name: str) -> str:
        """The flag as the trainer's users write it."""
        return f"{self.prefix}{name}"

    def needed(self, name: str) -> Any:
        """The value of a flag that the trainer requires. Raises PosttrainError if it was not given."""
        if (value := self[name]) is None:
            raise PosttrainError(f"{self.trainer} needs {self.spelled(name)}, and it is not given")
        return value

    def refused(self, name: str, why: str) -> PosttrainError:
        """The error of a flag whose value cannot be used."""
        return PosttrainError(f"{self.spelled(name)} {_short(self[name])}: {why}")

    def number(self, name: str, value: Any) -> float:
        """``value``, a part of the flag's value, as a number. Raises PosttrainError."""
        read = _number(value, "float")
        if read is _FAILED:
            raise self.refused(name, f"{shown(value)} is no number")
        return float(read)

    def hints(self) -> Iterator[str]:
        """A line for each unknown flag."""
        for name, value in self.unknown.items():
            text = "" if value is BARE else f" {_short(value)}"
            yield f"{self.spelled(name)}{text}{meant(name, self.table)}"

    def _read(self, name: str, value: Any) -> Any:
        flag = self.table[name]
        read = _value(flag, value)
        if read is _FAILED:
            what = "needs a value" if value is BARE else f"is {WORDS[flag.kind]}, not {shown(value)}"
            raise PosttrainError(f"{self.trainer}: {self.spelled(name)} {what}")
        if flag.least is not None and read is not None and read < flag.least:
            raise PosttrainError(
                f"{self.trainer}: {self.spelled(name)} is {flag.least} or more, not {shown(read)}"
            )
        if flag.choices and read is not None and read not in flag.choices:
            known = ", ".join(flag.choices)
            hint = meant(read, flag.choices)
            raise PosttrainError(
                f"{self.trainer}: {self.spelled(name)} is one of {known}, not {shown(read)}{hint}"
            )
        return read


_FAILED = object()


def _value(flag: Flag, value: Any) -> Any:
    """``value``, which may be a text, as ``flag`` reads it; ``_FAILED`` if it cannot."""
    if value is BARE:
        return True if flag.kind in ("bool", "any") else _FAILED
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        needed = flag.kind in ("int", "float", "bool", "list") or flag.choices
        return _FAILED if needed and flag.default is not None else None
    if flag.kind == "any":
        return _literal(value)
    if flag.kind == "text":
        return _FAILED if isinstance(value, dict | list | tuple) else str(value)
    if flag.kind == "bool":
        return _bool(value)
    if flag.kind in ("int", "float"):
        return _number(value, flag.kind)
    read = list(value) if isinstance(value, tuple) else _literal(value)
    return read if isinstance(read, dict if flag.kind == "map" else list) else _FAILED


def _literal(value: Any) -> Any:
    """``value``; if it is a text that Python reads as a number, a list or a mapping, that."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value
    return list(read) if isinstance(read, tuple) else read


def _bool(value: Any) -> Any:
    word = str(value).lower()
    return True if word in _TRUE else False if word in _FALSE else _FAILED


def _number(value: Any, kind: Kind) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _FAILED
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _FAILED
    if not math.isfinite(number) or (kind == "int" and number != int(number)):
        return _FAILED
    return number if kind == "float" else int(value) if isinstance(value, int) else int(number)


def _short(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 80 else shown(value)
