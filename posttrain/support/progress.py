"""Shows the progress of a stage: step, loss or reward, rate and time left."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from posttrain.support.display import shown
from posttrain.support.heartbeat import beat

NARROW = 80
"""A terminal with fewer columns shows only step, loss and time left, without bar and rate."""
INTERVAL_SECONDS = 10.0
"""Time between lines if the output is not a terminal."""


class StageProgress(ABC):
    """A progress display that is updated while work runs."""

    figures = ""
    """What is shown beside the steps."""
    narrow = False
    """Whether the terminal is too narrow to show the rate."""

    def update(
        self,
        done: int,
        *,
        loss: float | None = None,
        reward: float | None = None,
        images_per_second: float | None = None,
    ) -> None:
        """Show that ``done`` of the total steps are done, with the figures given, or else those of before."""
        beat()
        # a policy gradient's loss stays near 0 and says nothing, so the reward is shown instead
        figures = [f"reward {reward:.3f}"] if reward is not None else []
        figures += [f"loss {loss:.4f}"] if loss is not None and reward is None else []
        if images_per_second is not None and not self.narrow:
            figures.append(f"{images_per_second:.1f} images/s")
        self.figures = "  ".join(figures) or self.figures
        self._show(done, self.figures)

    @abstractmethod
    def _show(self, done: int, figures: str) -> None: ...


@contextlib.contextmanager
def stage_progress(name: str, total: int, start: int, console: Console) -> Iterator[StageProgress]:
    """A live bar on a terminal; else a line every 10 seconds."""
    name = shown(name)
    if not console.is_terminal:
        yield _Lines(name, total, start, console)
        return
    narrow = console.width < NARROW
    if narrow:
        # rich would shorten every column, even the step count; shorten only the name
        room = max(console.width - 2 * len(str(total)) - 27, 4)
        name = name if len(name) <= room else name[: room - 1] + "…"
    columns = [
        TextColumn("{task.description}", markup=False),
        *([] if narrow else [BarColumn(bar_width=20 if console.width >= 100 else 8)]),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    ]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, completed=start, figures="")
        yield _Bar(progress, task, narrow)


class _Bar(StageProgress):
    def __init__(self, progress: Progress, task: TaskID, narrow: bool) -> None:
        self.progress, self.task, self.narrow = progress, task, narrow

    def _show(self, done: int, figures: str) -> None:
        self.progress.update(self.task, completed=done, figures=figures)


class _Lines(StageProgress):
    def __init__(self, name: str, total: int, start: int, console: Console) -> None:
        self.name, self.total, self.start, self.console = name, total, start, console
        self.began = self.printed = time.monotonic()

    def _show(self, done: int, figures: str) -> None:
        now = time.monotonic()
        if done < self.total and now - self.printed < INTERVAL_SECONDS:
            return
        self.printed = now
        left = (now - self.began) / max(done - self.start, 1) * (self.total - done)
        line = f"{self.name}  {done}/{self.total}  {figures + '  ' if figures else ''}ETA {_clock(left)}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
