"""Where do a stage's numbers go? To metrics.jsonl always, and to TensorBoard where the recipe has it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

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
        rows.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()})
    return rows


class Tracker:
    """The records of a stage; a context manager.

    Opened again with ``resume_step`` it forgets what was recorded after that step, so the curves of a
    resumed run hold each step once.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0, tensorboard: bool = True) -> None:
        self.path = folder / METRICS
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(_line(row) for row in kept))
        os.replace(part, self.path)
        self._file = self.path.open("a")
        self._since = time.monotonic() - (kept[-1]["time"] if kept else 0.0)
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` of ``step``."""
        self._file.write(_line({"step": step, "time": time.monotonic() - self._since, **metrics}))
        self._file.flush()
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def image(self, name: str, step: int, image: Image) -> None:
        """Show ``image`` in TensorBoard."""
        if self._writer is not None:
            import numpy as np

            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
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
