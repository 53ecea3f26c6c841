"""Tells of errors in a user's own classes and functions: which one failed, how, and at which of his lines."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

from posttrain.errors import PosttrainError, UserCodeError

OURS = __name__.partition(".")[0]
SHOWN = 8
"""At most this many calls are shown, those nearest to the error."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raise UserCodeError for an error that a user's class raises in the block; others pass as they are."""
    try:
        yield
    except Exception as error:
        if (named := as_user_error(error)) is None:
            raise
        raise named from error


def as_user_error(error: Exception) -> UserCodeError | None:
    """The error that names the user's class whose method raised ``error``, with the method and his lines.

    None if no such method was running, or if ``error`` already is a message to the user.
    """
    if isinstance(error, PosttrainError):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if (owner := _user_class(frame)) is not None:
            hook = f"{owner.__module__}:{owner.__qualname__}.{frame.f_code.co_name}"
            return UserCodeError(f"{hook} failed: {with_lines(error)}")
    return None


def with_lines(error: BaseException) -> str:
    """``Type: message`` of ``error``, and below it the calls in the user's files that led to it, if any."""
    message = "".join(traceback.format_exception_only(error)).strip()
    return "\n".join([message, *(text.rstrip() for text in _calls(error).format())])


def with_place(error: BaseException) -> str:
    """The last line of ``error``, and the user's file and line that raised it, if any, in one line."""
    calls = [] if isinstance(error, SyntaxError) else _calls(error)  # its message has the place
    return last_line(error) + (f" ({calls[-1].filename}, line {calls[-1].lineno})" if calls else "")


def last_line(error: BaseException) -> str:
    """``Type: message``, as Python ends a traceback. Of a long message it is the last line; of pydantic's the
    first, which says what is wrong."""
    from pydantic import PydanticUserError  # which help does not need

    lines = [x for x in str(error).splitlines() if x.strip() and "For further information" not in x]
    line = lines[0 if isinstance(error, PydanticUserError) else -1].strip() if lines else ""
    return f"{type(error).__name__}{': ' if lines else ''}{line}"


def _calls(error: BaseException) -> traceback.StackSummary:
    """The calls in the traceback of ``error`` that lie in the user's code, the innermost last.

    His are the first package that is neither ours nor Python's, and all that is not installed.
    """
    every = list(traceback.walk_tb(error.__traceback__))
    # what called ours, such as the library of the command line, is not his
    classes = [i for i, (f, _) in enumerate(every) if _user_class(f)]
    files = [i for i, (f, _) in enumerate(every) if not (_is_ours(f) or _installed(f))]
    after = max((i for i, (f, _) in enumerate(every) if _package(f) == OURS), default=-1) + 1
    walked = [(f, line) for f, line in every[(classes or files or [after])[0] :] if not _is_ours(f)]
    first = next((_package(frame) for frame, _ in walked), None)
    shown = [(f, line) for f, line in walked if _package(f) == first or not _installed(f)]
    return traceback.StackSummary.extract(shown[-SHOWN:])


def _user_class(frame: FrameType) -> type | None:
    """The class of the user's own, made from one of ours, whose method runs in ``frame``; else None."""
    code = frame.f_code
    if _is_ours(frame) or _package(frame) == "pydantic" or not code.co_argcount:  # pydantic makes the class
        return None
    first: Any = frame.f_locals.get(code.co_varnames[0])
    owner = first if isinstance(first, type) else type(first)
    extends = any(base.__module__.partition(".")[0] == OURS for base in owner.__mro__)
    return owner if extends and owner.__module__.partition(".")[0] != OURS else None


def _is_ours(frame: FrameType) -> bool:
    """Whether the frame is posttrain's or Python's."""
    return _package(frame) == OURS or (not _installed(frame) and _in(frame, "stdlib", "platstdlib"))


def _installed(frame: FrameType) -> bool:
    """Whether the frame is of an installed package."""
    return _in(frame, "purelib", "platlib")


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _in(frame: FrameType, *places: str) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(("<frozen", *(sysconfig.get_path(place) for place in places)))
