"""Knows how fast this code was measured to run, and chooses the measurement that is nearest to a stage.

The rows are in ``rates.json``, which ``benchmarks/add_rates.py`` extends; a later row replaces an equal
earlier one. A row has the samples/s of a whole step and what a sample cost, so its rate can be counted as a
plan counts: a forward that checkpointing computes again is work, and the time of the autoencoder is not the
transformer's. Its ``mfu`` is counted as benchmarks count: what is computed again is no work, the
autoencoder's time is included, and 100 % are ``product_tflops``, a measured product of matrices.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("rates.json")
Kind = Literal["training", "rollout", "text", "encode", "decode"]
"""Kinds of work. ``rollout`` is every forward of the transformer that trains nothing."""
Precision = Literal["bf16", "tf32", "fp32"]
SMALLER = 8
"""A row fits no forward of fewer FLOPs than an eighth of its own: small models wait for launches instead."""

NEAR = 2
"""Micro-batches of so many times as many rows, or as few, are near each other."""


@dataclass(frozen=True)
class Row:
    """A measurement. FLOPs are of one sample."""

    kind: Literal["step", "sampling", "encode", "decode"]
    device: str
    """A name that :func:`posttrain.planning.gpus.gpu` knows."""
    precision: Precision
    samples_per_second: float
    """Of a whole step, with encoding or decoding of its images."""
    image_tflop: float
    """TFLOP of encoding or decoding one image."""
    product_tflops: float
    """TFLOP/s of a large bf16 product of matrices on the same machine."""
    date: str
    torch: str
    commit: str
    command: str
    algorithm: str | None = None
    tune: str = "none"
    compile: bool = False
    checkpointing: str = "off"
    micro_batch: int = 1
    """Rows in a forward with gradients; of sampling, images at a time."""
    resolution: int = 512
    tokens: int = 256
    forward_tflop: float = 0.0
    """TFLOP of a forward of the transformer."""
    rollout: float = 0.0
    """Forwards that train nothing, before the update."""
    frozen: float = 0.0
    """Forwards that train nothing, in the update."""
    training: float = 0.0
    """Forward-backwards."""
    images: Literal["encoded", "decoded"] | None = None
    """What the step did with each image; None if nothing."""
    mfu: float | None = None
    """As the benchmark counts it."""
    peak_gb: float | None = None
    note: str = ""

    @property
    def transformer_tflop(self) -> float:
        """TFLOP of the transformer's work, as a plan counts it."""
        recomputed = 1 if self.checkpointing == "full" else 0
        return self.forward_tflop * (self.rollout + self.frozen + self.training * (3 + recomputed))

    def __str__(self) -> str:
        about = f"{self.device}, {self.date}, commit {self.commit}"
        if self.kind in ("encode", "decode"):
            return f"{self.samples_per_second:g} images/s at {self.resolution} px ({about})"
        mode = "compiled" if self.compile else "eager"
        what = f"{self.algorithm} {self.tune}" if self.algorithm else self.kind
        return (
            f"{what}, {mode}, checkpointing {self.checkpointing}, micro_batch {self.micro_batch}: "
            f"{self.samples_per_second:g} samples/s ({about})"
        )


@dataclass(frozen=True)
class Wanted:
    """What a stage does, for which a row is sought."""

    kind: Kind
    device: str
    precision: Precision
    algorithm: str | None = None
    tune: str = "none"
    compile: bool = False
    checkpointing: str = "off"
    micro_batch: int = 1
    forward: float = math.inf
    """FLOPs of a forward of one row."""


class Rates:
    """Measured rows, the oldest first."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.rows: Sequence[Row] = list(rows)

    def nearest(self, wanted: Wanted) -> Row | None:
        """The row nearest to what is ``wanted``; None if none fits.

        A row fits if it did this kind of work in this precision, compiled or not as wanted, on a forward
        that is not far larger. Of those, the nearest has the same device before all others, then the same
        tuning and a micro-batch within a factor of NEAR (the micro-batch first if nothing is compiled: an
        eager step depends on it most), then the same checkpointing and algorithm, in this order, then the
        micro-batch at the smallest ratio; of equals, the newest.
        """

        def distance(row: Row) -> tuple[Any, ...]:
            ratio = abs(math.log(row.micro_batch / wanted.micro_batch))
            far, other = ratio > math.log(NEAR) + 1e-9, row.tune != wanted.tune
            return (
                row.device != wanted.device,
                *((other, far) if wanted.compile else (far, other)),
                row.checkpointing != wanted.checkpointing,
                row.algorithm != wanted.algorithm,
                ratio,
            )

        fitting = [row for row in self.rows if _fits(row, wanted)]
        return min(reversed(fitting), key=distance, default=None)

    def flops_per_second(self, row: Row) -> float:
        """FLOP/s of a row's work as a plan counts it: of the transformer, or of the autoencoder."""
        if row.kind in ("encode", "decode"):
            return row.image_tflop * 1e12 * row.samples_per_second
        seconds = 1 / row.samples_per_second
        if row.images is not None:
            kind: Kind = "encode" if row.images == "encoded" else "decode"
            autoencoder = self.nearest(Wanted(kind, row.device, "tf32"))
            if autoencoder is not None and autoencoder.device == row.device:
                seconds -= row.image_tflop * 1e12 / self.flops_per_second(autoencoder)
        return row.transformer_tflop * 1e12 / seconds


@cache
def shipped_rates() -> Rates:
    """The rates that come with the package."""
    return Rates(read_rows(FILE))


def read_rows(file: Path) -> list[Row]:
    """The rows in ``file``, which has a list of sessions, each with what its rows have in common."""
    sessions = json.loads(file.read_text("utf-8"))["sessions"]
    return [
        Row(**{name: value for name, value in session.items() if name != "rows"}, **row)
        for session in sessions
        for row in session["rows"]
    ]


def _fits(row: Row, wanted: Wanted) -> bool:
    if row.precision != wanted.precision:
        return False
    if wanted.kind in ("encode", "decode"):
        return row.kind == wanted.kind
    work = {"training": row.training, "rollout": row.rollout}.get(wanted.kind, 0)
    large_enough = wanted.forward >= row.forward_tflop * 1e12 / SMALLER
    return work > 0 and row.compile == wanted.compile and large_enough
