"""Tells the launcher of ``--nproc`` that this process goes on or failed, and ends it with its launcher.

A process goes on as long as it touches its file every now and then: for each micro-batch, each batch of
samples or encodings, and before each exchange with the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

from posttrain.errors import PosttrainError

CHILD = "POSTTRAIN_CHILD"
"""Set to the launcher's process id in the environment of processes that ``--nproc`` starts."""
FOLDER = "POSTTRAIN_BEATS"
"""Set to the folder of the processes' files in that environment."""
ELASTIC = "TORCHELASTIC_RUN_ID"
"""Set by torchrun and accelerate."""
PATIENCE = "POSTTRAIN_PATIENCE"
"""Minutes that a process may take without a sign that it goes on, and that the others wait for it."""
DEFAULT_MINUTES = 30.0
"""A reward may be slow, and the first step of a large model is compiled."""
LOOK_SECONDS = 1.0
"""Time between two looks at the launcher."""
PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent ends."""


def patience_seconds() -> float:
    """How long processes wait for one that does not go on. Raises PosttrainError for a wrong setting."""
    given = os.environ.get(PATIENCE, str(DEFAULT_MINUTES))
    try:
        minutes = float(given)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise PosttrainError(f"{PATIENCE}={given!r} in the environment: a number of minutes greater than 0")
    return minutes * 60


def beat_file(folder: str | Path, rank: int | str) -> Path:
    """The file that process ``rank`` touches."""
    return Path(folder) / f"{rank}.beat"


def failure_file(folder: str | Path, rank: int | str) -> Path:
    """The file that process ``rank`` leaves when it fails: its time orders it among others."""
    return Path(folder) / f"{rank}.failed"


def beat() -> None:
    """Say that this process goes on."""
    if (folder := os.environ.get(FOLDER)) is not None:
        with contextlib.suppress(OSError):  # the launcher is gone, and this process ends soon
            beat_file(folder, os.environ["RANK"]).touch()


def note_failure() -> None:
    """Say that this process failed, before the others fail because they miss it."""
    if (folder := os.environ.get(FOLDER)) is not None:
        with contextlib.suppress(OSError):
            failure_file(folder, os.environ["RANK"]).write_text(str(time.time_ns()), "utf-8")


def anew_file(folder: str | Path) -> Path:
    """The file that says of :func:`note_begun_anew` in a process."""
    return Path(folder) / "begun-anew"


def note_begun_anew() -> None:
    """Say that what ``--fresh`` names is removed: the command that goes on leaves the option out."""
    global begun_anew
    begun_anew = True
    if (folder := os.environ.get(FOLDER)) is not None:
        with contextlib.suppress(OSError):
            anew_file(folder).touch()


begun_anew = False
"""Whether :func:`note_begun_anew` was called, in this process or in one that it started."""


def watch_launcher() -> None:
    """End this process when the launcher that started it ends, and let SIGUSR2 show where it stands.

    Does nothing in a process that neither ``--nproc`` nor torchrun started.
    """
    if CHILD not in os.environ and ELASTIC not in os.environ:
        return
    parent = int(os.environ.get(CHILD, os.getppid()))
    if CHILD in os.environ:
        if hasattr(signal, "SIGUSR2"):
            faulthandler.register(signal.SIGUSR2, all_threads=True)
        if sys.platform == "linux":  # it also ends a process that is stopped
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="launcher", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    with contextlib.suppress(OSError):
        os.write(2, b"posttrain: the launcher has ended, and this process ends with it\n")
    os._exit(1)
