"""Ends a command: with a result, one message for an error, or one line on how to go on after a signal."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from posttrain.distributed.leaving import leave
from posttrain.support import heartbeat, stopping
from posttrain.support.heartbeat import CHILD, note_failure, watch_launcher

SERVERS = ("serve-reward",)
"""Commands whose server handles signals by itself."""


def run_to_the_end(command: Callable[[], object]) -> None:
    """Run ``command``. An error that the user can correct is one message and exit code 1. Work that a signal
    stopped is one line and exit code 75."""
    watch_launcher()
    speaks = os.environ.get("RANK", "0") == "0" and CHILD not in os.environ
    tell = None if speaks else _silent
    serves = sys.argv[1:2] and sys.argv[1] in SERVERS
    with contextlib.nullcontext() if serves else stopping.handling(tell):
        try:
            _run(command)
        except stopping.Stopped as stop:
            if speaks:
                _print("", _how_to_go_on(str(stop)))
            _exit(stopping.EXIT_CODE)


def _run(command: Callable[[], object]) -> None:
    try:
        command()
    except SystemExit as ended:  # what typer raises at the end of every command
        if ended.code not in (0, None):
            raise
        _exit(0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from posttrain.errors import PosttrainError
        from posttrain.support.user_errors import as_user_error

        note_failure()
        if "--debug" in sys.argv:
            raise
        error = as_user_error(error) or error
        if not isinstance(error, (PosttrainError, OSError, MemoryError)):
            raise
        message = str(error) or type(error).__name__
        if _to_go_on(sys.argv) != sys.argv:
            message += "\nTo go on, leave --fresh out: with it, the stage begins anew each time"
        _print("error: ", message)
        _exit(1)


def _exit(code: int) -> None:
    """End this process, which may be one of several."""
    if CHILD not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    leave(code)


def _how_to_go_on(kept: str) -> str:
    """The line after a signal; ``kept`` says what is kept."""
    signal = stopping.name_of_signal()
    program = Path(sys.argv[0]).name
    words = ["python", "-m", "posttrain"] if program == "__main__.py" else [program]
    end = f"stopped{f' by {signal}' if signal else ''}{f': {kept}' if kept else ''}"
    return f"{end}. To go on: {shlex.join([*words, *_to_go_on(sys.argv[1:])])}"


def _silent(line: str) -> None:
    """One of several processes says nothing: the main one or the launcher does."""
    del line


def _to_go_on(arguments: Sequence[str]) -> list[str]:
    """The command line that goes on. Once ``--fresh STAGE`` has removed the stage, it is left out: with it,
    the stage would begin anew each time."""
    if not heartbeat.begun_anew:
        return [*arguments]
    kept, left = list[str](), iter(arguments)
    for argument in left:
        if argument == "--fresh":
            next(left, None)
        elif not argument.startswith("--fresh="):
            kept.append(argument)
    return kept


def _print(heading: str, message: str) -> None:
    from rich.text import Text

    from posttrain.support.display import shown
    from posttrain.support.terminal import Terminal

    Terminal(stderr=True).print(Text.assemble((heading, "bold red"), shown(message)), soft_wrap=True)
