"""Ends a process that is one of several."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with exit code ``code`` at once, without taking Python apart first.

    Threads of torch's process groups outlive the groups. While Python is taken apart they wait for ever, or
    abort the process ("terminate called without an active exception") after all its work is done. A process
    that did its work (``code`` 0) still calls what was registered with :mod:`atexit`.
    """
    if code == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
