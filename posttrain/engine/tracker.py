"""Records a stage's metrics in metrics.jsonl, and in TensorBoard if the recipe asks for it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from posttrain.support.files import write

if TYPE_CHECKING:
    from PIL.Image import Image

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; [] if there is none.

    Floats that are not finite are restored, and a torn last line is left out.
    """
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a process was killed in the middle of a write
        rows.append({k: float(v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


def binned(values: Sequence[float], count: int = 20) -> dict[str, Any]:
    """The histogram of ``values``: ``low``, ``high``, and the ``counts`` of ``count`` equal bins between."""
    import numpy as np

    counts, edges = np.histogram(np.asarray(values, dtype=float), bins=count)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


class MetricsFile:
    """An append-only file with one JSON object per line: step, seconds since the start, and the metrics.

    Each line is flushed when it is written. Opening replaces the file atomically by its rows up to
    ``resume_step``; with the default of 0 the file starts empty.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write(path, "".join(_line(row) for row in kept))
        self._file = path.open("a")
        self._since = time.monotonic() - (kept[-1]["time"] if kept else 0.0)

    def log(
        self, step: int, metrics: Mapping[str, float], bins: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """Append the ``metrics`` of ``step``, and its histograms ``bins`` as given.

        Raises TypeError or ValueError for a metric that is not a number.
        """
        seconds = time.monotonic() - self._since
        # float() also accepts scalars of numpy and torch, which json refuses
        numbers = {name: float(value) for name, value in metrics.items()}
        self._file.write(_line({"step": step, "time": seconds, **numbers, **(bins or {})}))
        self._file.flush()

    def close(self) -> None:
        """Close the file. A file that is not closed loses nothing."""
        self._file.close()


class Tracker:
    """The records of a stage; a context manager.

    Opening drops what was recorded after ``resume_step``, so the curves of a resumed run hold each step once.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0, tensorboard: bool = True) -> None:
        self.metrics = MetricsFile(folder / METRICS, resume_step=resume_step)
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        histograms: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Record the ``metrics`` of ``step``, and its ``histograms`` (name -> values) as :func:`binned`."""
        bins = {name: binned(values) for name, values in (histograms or {}).items()}
        self.metrics.log(step, metrics, bins)
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            for name, values in (histograms or {}).items():
                import numpy as np

                self._writer.add_histogram(name, np.asarray(values), step)

    def image(self, name: str, step: int, image: Image) -> None:
        """Add ``image`` to TensorBoard, if it is in use."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered, and close the files."""
        self.metrics.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(row: Mapping[str, Any]) -> str:
    # JSON has no NaN, and readers in other languages must be able to read a diverged run
    safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe) + "\n"
