"""Formats numbers, sizes and durations for people."""

from __future__ import annotations


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
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def counted(count: int, noun: str) -> str:
    """A count with its noun, such as ``1 image`` or ``4 images``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def multiples_near(value: int, unit: int) -> str:
    """The positive multiples of ``unit`` next to ``value``, such as ``32 or 48``."""
    low = value // unit * unit
    return " or ".join(str(multiple) for multiple in (low, low + unit) if multiple > 0)


def no_multiple(value: int, unit: int) -> str:
    """The message for a side of ``value`` pixels that is not a multiple of the model's ``unit``."""
    near = multiples_near(value, unit)
    return f"{value} is no multiple of the {unit} pixels that this model needs; the nearest are {near}"
