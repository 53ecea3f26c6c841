"""Where do a stage's numbers go? To metrics.jsonl always, and to TensorBoard where the recipe has it."""

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
    """The rows of a metrics file, with floats that are not finite restored; a torn last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # only a kill in the middle of a write leaves one
        rows.append({k: float(v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


def binned(values: Sequence[float], count: int = 20) -> dict[str, Any]:
    """``{"low", "high", "counts"}``: how many of ``values`` lie in each of ``count`` equal bins."""
    import numpy as np

    counts, edges = np.histogram(np.asarray(values, dtype=float), bins=count)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


class MetricsFile:
    """An append-only file with one JSON object a line: step, seconds since the start, and the metrics.

    Each line is flushed as it is written. Opening drops the lines after ``resume_step`` and a torn last
    line, by an atomic replacement: with the default of 0 the file starts empty.
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
        """Append ``metrics`` of ``step``, and ``bins`` of histograms as they are. Raises TypeError or
        ValueError for a metric that is no number."""
        seconds = time.monotonic() - self._since
        # float() also takes the scalars of numpy and torch, which json refuses
        numbers = {name: float(value) for name, value in metrics.items()}
        self._file.write(_line({"step": step, "time": seconds, **numbers, **(bins or {})}))
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._file.close()


class Tracker:
    """The records of a stage; a context manager.

    Opened again with ``resume_step`` it forgets what was recorded after that step, so the curves of a
    resumed run hold each step once.
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
        """Record ``metrics`` of ``step``, and the values of ``histograms`` as :func:`binned`."""
        bins = {name: binned(values) for name, values in (histograms or {}).items()}
        self.metrics.log(step, metrics, bins)
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            for name, values in (histograms or {}).items():
                import numpy as np

                self._writer.add_histogram(name, np.asarray(values), step)

    def image(self, name: str, step: int, image: Image) -> None:
        """Show ``image`` in TensorBoard."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
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
    # JSON has no NaN; a reader in another language must not choke on a diverged run
    safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe) + "\n"
