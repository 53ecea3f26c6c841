"""Starts a run for benchmarks/torture.py in one process or several, and kills it as told.

Several are those of ``posttrain run --nproc``. Launcher and processes are copies of this one, which need not
import torch again; nothing else of them is replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from posttrain.distributed import launch

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link"}
"""Audit events that change a folder, besides ``open``."""
LAUNCHER, ALL = "launcher", "all"
ORDER = "TORTURE"
"""Variable of the environment: the words of an Order."""
END_SECONDS = 120
"""Within this time after a kill the launcher and all processes must have ended."""


@dataclass(frozen=True)
class Order:
    """Who is killed, and at which file operation of which process."""

    victim: str
    """The rank of a process, LAUNCHER or ALL."""
    rank: int = 0
    """Of the process whose file operations count."""
    last: int = 0
    """Number of the operation, from 1; 0: none."""


class Operations:
    """Counts this process's file operations in ``folder``, notes the last and kills at the order's."""

    def __init__(self, folder: Path, order: Order, rank: int) -> None:
        self.folder, self.order, self.count = str(folder), order, 0
        self.last = order.last if order.rank == rank else 0
        self.notes = noted(folder)
        self.counted = os.open(self.notes / f"{rank}.count", os.O_RDWR | os.O_CREAT)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" and event not in CHANGES:
            return
        name = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
        writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if not name.startswith(self.folder + os.sep) or not writes:
            return
        self.count += 1
        os.pwrite(self.counted, str(self.count).encode(), 0)
        if self.count == self.last:
            self.last = 0  # what follows is no operation of the run
            (self.notes / "place").write_text(f"{event} {name[len(self.folder) :]}", "utf-8")
            kill(self.notes, self.order.victim)


def noted(folder: Path) -> Path:
    """Where the processes of the run in ``folder`` leave their numbers, counts and words."""
    (notes := folder.with_suffix(".notes")).mkdir(exist_ok=True)
    return notes


def kill(notes: Path, victim: str) -> None:
    """Kill ``victim``, or the launcher if that process is not there yet or no longer."""
    while not (notes / f"{LAUNCHER}.pid").exists():
        time.sleep(0.01)
    pids = {file.stem: int(file.read_text("utf-8")) for file in notes.glob("*.pid")}
    with contextlib.suppress(ProcessLookupError):
        if victim == ALL:
            os.killpg(pids[LAUNCHER], signal.SIGKILL)
            return
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(pids[victim], signal.SIGKILL)
            return
        os.kill(pids[LAUNCHER], signal.SIGKILL)


class Copy:
    """A copy of this process that runs posttrain's command line; stands for subprocess.Popen."""

    def __init__(
        self, command: Sequence[str], env: dict[str, str], stdout: Any = None, stderr: Any = None
    ) -> None:
        words, fork = command[command.index("posttrain") + 1 :], multiprocessing.get_context("fork")
        self._process = fork.Process(target=_posttrain, args=(words, env, stderr))
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """As of subprocess.Popen."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As of subprocess.Popen."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """As of subprocess.Popen."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("posttrain", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As of subprocess.Popen."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As of subprocess.Popen."""
        self._process.kill()


def started(folder: Path, recipe: Path, count: int, order: Order, seconds: float | None = None) -> str | None:
    """Start the run of ``recipe`` in ``count`` processes, and kill as told by ``order`` or after ``seconds``.

    Returns where it was killed; None if it finished. Raises SystemExit if a process is left, or if the run
    ended by itself without finishing.
    """
    notes = noted(folder)
    for file in [*notes.glob("*.pid"), notes / "place"]:
        file.unlink(missing_ok=True)
    words = ["posttrain", "run", str(recipe), "--output", str(folder / "run")]
    order_words = f"{order.victim} {order.rank} {order.last} {folder}"
    several = ["--nproc", str(count)] if count > 1 else []
    process = Copy([*words, *several], {**os.environ, ORDER: order_words, "OMP_NUM_THREADS": "1"})
    killed = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        kill(notes, order.victim)
        killed = True
    try:
        process.wait(END_SECONDS if killed else None)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{folder}: the launcher did not end after a kill of {order.victim}") from None
    if left := _left(process.pid):
        raise SystemExit(f"{folder}: processes {left} are left after a kill of {order.victim}")
    if process.returncode == 0:
        return None
    if (notes / "place").is_file():
        return (notes / "place").read_text("utf-8")
    if not killed:
        raise SystemExit(f"{folder}: a start ended with {process.returncode} without a kill, see {notes}")
    return "time"


def _left(leader: int) -> list[int]:
    """The processes of the session ``leader`` that are there END_SECONDS after its end."""
    until = time.monotonic() + END_SECONDS
    while (found := _session(leader)) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def _session(leader: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = file.read_text("utf-8").rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(session) == leader and state != "Z":
            found.append(int(file.parent.name))
    return found


def _posttrain(words: list[str], environment: dict[str, str], stderr: Any) -> None:
    """The process of a launcher, of a rank, or of a run of one process."""
    os.environ.clear()
    os.environ.update(environment)
    victim, counting, last, folder = environment[ORDER].split(" ", 3)
    notes, rank = noted(Path(folder)), environment.get("RANK")
    if rank is None:
        os.setsid()
    said = (notes / f"{rank or LAUNCHER}.txt").open("ab")
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno() if stderr is None else stderr.fileno(), 2)
    (mine := notes / f"{rank or LAUNCHER}.pid.part").write_text(str(os.getpid()), "utf-8")
    mine.rename(mine.with_suffix(""))
    if "--nproc" in words:
        launch.subprocess = SimpleNamespace(Popen=Copy, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    else:
        order = Order(victim, int(counting), int(last))
        sys.addaudithook(Operations(Path(folder), order, int(rank or 0)))
    sys.argv = ["posttrain", *words]
    from posttrain.cli.app import main

    main()
