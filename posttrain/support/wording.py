"""Formats numbers, sizes, durations and docstrings for people."""

from __future__ import annotations

import inspect
import re
from typing import Any

LOGIN = re.compile(r"(?<=://)[^\s/]+@")
"""The user and the password in an address."""
MARKUP = re.compile(r":\w+:`([^`]*)`|``")
"""The markup of docstrings: a role such as ``:class:``, of which the name stays, and the marks of code."""
SHOWN_CHARACTERS = 80
"""An error shows this much of a value that somebody else has sent."""


def short(value: float | None, unit: str = "") -> str:
    """A number with an SI prefix, such as 55.2k, or 1.2 GB with the unit "B"; a dash for None."""
    if value is None:
        return "–"
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    while abs(float(f"{value:.3g}")) >= 1000 and len(prefixes) > 1:  # so that 999.9 becomes 1k
        value /= 1000
        prefixes.pop(0)
    prefix = prefixes[0]
    return f"{value:.3g}{' ' if unit else ''}{prefix}{unit}"


def duration(seconds: float | None) -> str:
    """A duration such as ``26 min``; a dash for None."""
    if seconds is None:
        return "–"
    if 0 < seconds < 1:
        return "< 1 s"
    if round(seconds) < 100:
        return f"{seconds:.0f} s"
    if (minutes := round(seconds / 60)) < 100:
        return f"{minutes} min"
    if minutes < 100 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} days {hours % 24} h"


def described(kind: type, family: type) -> str:
    """The first paragraph of a class's docstring on one line, without the markup of docstrings.

    A class without one has that of the nearest class that it inherits from, below ``family``; else "".
    """
    own = kind.__mro__[: kind.__mro__.index(family)]
    text = next((base.__doc__ for base in own if base.__doc__), "")
    paragraph = inspect.cleandoc(text).partition("\n\n")[0]
    return " ".join(MARKUP.sub(r"\1", paragraph).split())


def counted(count: int, noun: str) -> str:
    """A count with its noun, such as ``1 image`` or ``4 images``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def nearest(value: int, unit: int) -> str:
    """Names the positive multiples of ``unit`` next to ``value``, as in ``the nearest are 32 or 48``."""
    low = value // unit * unit
    return f"the nearest are {low} or {low + unit}" if low else f"the nearest is {unit}"


def no_multiple(value: int, unit: int) -> str:
    """The message for a side of ``value`` pixels that is not a multiple of the model's ``unit``."""
    return f"{value} is no multiple of the {unit} pixels that this model needs; {nearest(value, unit)}"


def shown(value: Any) -> str:
    """The beginning of ``value`` as code shows it, for an error. Its sender may have made it long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def without_logins(text: str) -> str:
    """``text`` without the user and the password in its addresses: ``https://HOST`` for
    ``https://USER:PASSWORD@HOST``."""
    return LOGIN.sub("", text)
