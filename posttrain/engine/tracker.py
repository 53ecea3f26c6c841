"""Records a stage's metrics in metrics.jsonl, and in TensorBoard if the recipe asks for it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from posttrain.engine.service import Service
from posttrain.support.files import write
from posttrain.support.write_errors import writing

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS, DAMAGED = "metrics.jsonl", "metrics.damaged.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; [] if there is none.

    Floats that are not finite are restored. Left out is what is no row: a torn last line, of a process that
    was killed while it wrote, and lines that were damaged later (see :func:`mend`).
    """
    return [row for row in _rows(path) if row is not None]


def damaged_lines(path: Path) -> list[int]:
    """The numbers, from 1, of the damaged lines of a metrics file.

    A last line without an end is not one: a kill tears it.
    """
    rows = _rows(path)
    torn = bool(rows) and not path.read_bytes().endswith(b"\n")
    return [i for i, row in enumerate(rows[: len(rows) - torn], 1) if row is None]


def mend(path: Path) -> list[int]:
    """Write a metrics file anew without its damaged lines, and keep the old one as ``DAMAGED``.

    Returns the numbers of the damaged lines.
    """
    if damaged := damaged_lines(path):
        write(path.with_name(DAMAGED), path.read_bytes())
        write(path, "".join(json_line(row) for row in read_metrics(path)))
    return damaged


def _rows(path: Path) -> list[dict[str, Any] | None]:
    """The rows of a metrics file, one for each line; None for a line that is no row."""
    if not path.is_file():
        return []
    return [_row(line) for line in path.read_text("utf-8", errors="replace").splitlines()]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        read = {k: float(v) if isinstance(v, str) else v for k, v in row.items()}
    except (ValueError, AttributeError, RecursionError):
        return None
    return read if type(read.get("step")) is int else None


def binned(values: Sequence[float], count: int = 20) -> dict[str, Any]:
    """The histogram of the finite ``values``: ``low``, ``high``, and the ``counts`` of ``count`` equal bins
    between."""
    import numpy as np

    finite = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    counts, edges = np.histogram(finite, bins=count)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


class MetricsFile:
    """An append-only file with one JSON object per line: step, seconds since the start, and the metrics.

    Each line is flushed when it is written. Opening replaces the file atomically by its rows up to
    ``resume_step``, of which there were ``rows`` if that is known; by default it starts empty.
    """

    def __init__(self, path: Path, *, resume_step: int = 0, rows: int | None = None) -> None:
        self.path = path
        before = read_metrics(path)
        # the step is asked too: a damaged line that was left out would let a later row take its place
        kept = [row for row in before[:rows] if row["step"] <= resume_step]
        self.rows = len(kept)
        write(path, "".join(json_line(row) for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._since = time.monotonic() - (kept[-1].get("time", 0.0) if kept else 0.0)

    def log(
        self, step: int, metrics: Mapping[str, float], bins: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """Append the ``metrics`` of ``step``, and its histograms ``bins`` as given.

        Raises TypeError or ValueError for a metric that is not a number.
        """
        seconds = time.monotonic() - self._since
        # float() also accepts scalars of numpy and torch, which json refuses
        numbers = {name: float(value) for name, value in metrics.items()}
        line = json_line({"step": step, "time": seconds, **numbers, **(bins or {})})
        with writing(self.path, len(line)):
            self._file.write(line)
            self._file.flush()
        self.rows += 1

    def on_disk(self) -> int:
        """Flush all rows to the disk; return their number."""
        os.fsync(self._file.fileno())
        return self.rows

    def close(self) -> None:
        """Close the file. A file that is not closed loses nothing."""
        with contextlib.suppress(OSError):  # a line that could not be written is tried again, and was told
            self._file.close()


class Tracker:
    """The records of a stage; a context manager.

    Opening drops what was recorded after the checkpoint of ``resume_step``, when there were ``rows`` rows, so
    the curves of a resumed run hold each step once. ``rows`` is None if their number is not known.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int = 0,
        rows: int | None = None,
        tensorboard: bool = True,
        service: Service | None = None,
    ) -> None:
        """``service``, if there is one, gets the metrics and images too; it is closed with the tracker."""
        self.service = service
        self.metrics = MetricsFile(folder / METRICS, resume_step=resume_step, rows=rows)
        self._writer, self._curves = None, folder / "tensorboard"
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first = 0 if self.metrics.rows == 0 else resume_step + 1
            with writing(self._curves):
                self._writer = SummaryWriter(str(self._curves), purge_step=first)

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Record the ``metrics`` of ``step``, and its ``histograms`` (name -> values) as :func:`binned`."""
        bins = {name: binned(values) for name, values in (histograms or {}).items()}
        self.metrics.log(step, metrics, bins)
        if self.service is not None:
            self.service.log(step, metrics)
        if self._writer is not None:
            import numpy as np

            with writing(self._curves):
                for name, value in metrics.items():
                    self._writer.add_scalar(name, value, step)
                for name, values in (histograms or {}).items():
                    self._writer.add_histogram(name, np.asarray(values), step)

    def image(self, name: str, step: int, image: Image) -> None:
        """Add ``image`` to TensorBoard and to the service, if they are in use."""
        if self.service is not None:
            self.service.image(name, step, image)
        if self._writer is not None:
            import numpy as np

            with writing(self._curves):
                self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered, and close the files."""
        self.metrics.close()
        if self.service is not None:
            self.service.close()
        if self._writer is not None:
            with writing(self._curves):
                self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def json_line(row: Mapping[str, Any]) -> str:
    """``row`` as a line of a JSONL file."""
    # JSON has no NaN, and readers in other languages must be able to read a diverged run
    safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe) + "\n"
