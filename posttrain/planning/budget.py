"""Says how long counted work takes on given devices: at a measured rate, a given MFU, or an assumed one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from posttrain.planning.gpus import Device, gpu, known_name
from posttrain.planning.rates import Kind, Precision, Rates, Row, Wanted, shipped_rates

if TYPE_CHECKING:
    from posttrain.planning.needs import Needs

ASSUMED_MFU = 0.4
"""The model FLOPs utilisation that is assumed where no measured row fits. Well-made training of large
transformers reaches it; this code has been measured from 8 to 50 %."""
DEVICES_PER_MACHINE = 8
"""Assumed number of devices that share one machine's CPU memory."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Pace:
    """How fast one device does a kind of work, and why a plan says so."""

    flops: float
    """FLOP/s."""
    source: str
    """Where the rate comes from: "assumed", "given", "measured" and a file, or "row"."""
    row: Row | None = None
    """The measured row, if the rate is one's."""


@dataclass(frozen=True)
class Budget:
    """The devices to plan for, and how well they are used."""

    device: Device
    devices: int
    mfu: float | None = None
    """A given MFU for all work; None to take the measured rows."""
    mfu_source: str = "given"
    """Where the MFU comes from: "given", or "measured" and a file."""
    tf32: bool = True
    """Whether training multiplies float32 matrices in TF32. Evaluations never do."""
    rates: Rates = field(default_factory=shipped_rates)

    def pace(self, needs: Needs, kind: Kind, precision: Precision) -> Pace:
        """How fast one device does the ``kind`` of work of ``needs``. Recomputation counts as work.

        A rate of another device is scaled by the ratio of the peaks. That of an eager transformer is not: it
        waits for the host, so it is taken as it is, up to the assumed MFU of the device.
        """
        peak = self.device.peak(precision)
        if self.mfu is not None:
            return Pace(peak * self.mfu, self.mfu_source)
        wanted = Wanted(kind, known_name(self.device.name), precision, **needs.mode)
        row = self.rates.nearest(wanted) if self.device.has(precision) else None
        if row is None:
            return Pace(peak * ASSUMED_MFU, "assumed")
        flops = self.rates.flops_per_second(row)
        if row.device == wanted.device:
            return Pace(flops, "row", row)
        if kind in ("training", "rollout") and not row.compile:
            # launching kernels takes the host as long for a slower GPU, which has more time for it
            most = peak * ASSUMED_MFU
            return Pace(flops, "row", row) if flops < most else Pace(most, "assumed")
        measured = self.device.source == "measured" and precision == "bf16"
        of = row.product_tflops * 1e12 if measured else gpu(row.device).peak(precision)
        return Pace(flops * peak / of, "row", row)

    def is_of(self, row: Row) -> bool:
        """Whether the row was measured on such a device."""
        return row.device == known_name(self.device.name)

    def seconds_by_kind(self, needs: Needs) -> dict[Kind, float]:
        """Seconds of each kind of work, on all devices together."""
        return {kind: self._seconds(needs, kind) for kind in KINDS}

    def seconds(self, needs: Needs) -> float:
        """How long the work of ``needs`` takes."""
        return sum(self.seconds_by_kind(needs).values())

    def paces(self, needs: Needs) -> dict[Kind, Pace]:
        """The pace of each kind of work that there is."""
        return {
            kind: self.pace(needs, kind, precision)
            for kind in KINDS
            for precision, flops in self._amounts(needs, kind)
            if flops
        }

    def host(self, needs: Needs) -> float:
        """Bytes of the CPU's memory on one machine."""
        return needs.memory.host * min(self.devices, DEVICES_PER_MACHINE)

    def _seconds(self, needs: Needs, kind: Kind) -> float:
        return sum(
            flops / self.pace(needs, kind, precision).flops / self.devices
            for precision, flops in self._amounts(needs, kind)
            if flops
        )

    def _amounts(self, needs: Needs, kind: Kind) -> list[tuple[Precision, float]]:
        work = needs.works[kind]
        full: Precision = "tf32" if self.tf32 and not needs.evaluates else "fp32"
        return [("bf16", work.low), (full, work.full)]
