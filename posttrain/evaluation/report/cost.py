"""Adds up what stages and their evaluations cost, in hours of devices and in forward-equivalents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.evaluation.report.results import StageResult
from posttrain.evaluation.report.view import Cell, Row, Table
from posttrain.support.wording import short

UNITS = "One {unit} is one {device} for an hour."
NOTE = (
    "Training is the steps alone, without loading, image grids, held-out scores and checkpoints. A "
    "forward-equivalent is one transformer forward of one sample; a forward-backward counts 3."
)


@dataclass(frozen=True)
class Cost:
    """Hours of devices, and forward-equivalents. None is what was not recorded."""

    device: str
    """"GPU" or "CPU"; hours of a CPU are those of one core."""
    hours: float | None = None
    forward_equivalents: float | None = None

    def __add__(self, other: Cost) -> Cost:
        hours = _sum(self.hours, other.hours)
        return Cost(self.device, hours, _sum(self.forward_equivalents, other.forward_equivalents))

    def cell(self) -> Cell:
        """The hours, and below them the forward-equivalents."""
        if self.hours is None and self.forward_equivalents is None:
            return Cell()
        spent = self.forward_equivalents
        return Cell(
            hours_text(self.hours, f"{self.device}-h"),
            [] if spent is None else [f"{short(spent)} forward-eq."],
        )


def training_cost(stage: StageResult) -> Cost:
    """What the steps of ``stage`` cost, in all processes."""
    kind, cores = device_of(stage)
    account = stage.account
    processes = account.get("parallel", {}).get("processes", 1)
    return _cost(kind, account, processes * cores)


def evaluation_cost(stage: StageResult) -> Cost:
    """What the evaluation of ``stage`` cost. Its card has the seconds of all processes together."""
    kind, cores = device_of(stage)
    return _cost(kind, stage.card, cores)


def device_of(stage: StageResult) -> tuple[str, int]:
    """The kind of device that a stage ran on, "GPU" or "CPU", and the cores of each process, 1 for a GPU."""
    told = {**stage.environment, **stage.account}
    if not str(told.get("device", "cpu")).startswith("cpu"):
        return "GPU", 1
    return "CPU", threads if isinstance(threads := told.get("threads"), int) else 1


def cost_table(stages: Sequence[StageResult]) -> tuple[Table | None, str]:
    """The costs of stages, and a note on the units. None without stages.

    The last row has the sums of all stages, one for each kind of device.
    """
    rows, totals = [], dict[str, tuple[Cost, Cost]]()
    for i, stage in enumerate(stages):
        training, evaluation = training_cost(stage), evaluation_cost(stage)
        kind = training.device
        before = totals.get(kind, (Cost(kind), Cost(kind)))
        totals[kind] = before[0] + training, before[1] + evaluation
        rows.append(Row(stage.name, [*_cells(training, evaluation), _speed(stage)], origin(stage), i))
    for kind, costs in totals.items():
        name = "in all" if len(totals) == 1 else f"in all, {kind}"
        rows.append(Row(name, [*_cells(*costs), Cell("")], total=True))
    parts = [UNITS.format(unit=f"{k}-h", device="CPU core" if k == "CPU" else k) for k in totals]
    heads = ["training", "evaluation", "together", "training ran at"]
    if all(cell == Cell() for row in rows for cell in row.cells[1:2]):  # nothing was evaluated
        heads = [heads[0], heads[3]]
        rows = [replace(row, cells=[row.cells[0], row.cells[3]]) for row in rows]
    return Table("Cost", "stage", heads, rows) if rows else None, " ".join([*parts, NOTE])


def _cost(kind: str, told: Mapping[str, Any], devices: int) -> Cost:
    seconds, spent = (_number(told.get(name)) for name in ("seconds", "forward_equivalents"))
    return Cost(kind, None if seconds is None else seconds * devices / 3600, spent)


def _cells(training: Cost, evaluation: Cost) -> list[Cell]:
    return [training.cell(), evaluation.cell(), (training + evaluation).cell()]


def _speed(stage: StageResult) -> Cell:
    """Images a second, with steps, memory and the number of trained parameters below."""
    account = stage.account
    if (rate := account.get("images_per_second")) is None:
        return Cell()
    told = (
        ("steps", short(account.get("steps"))),
        ("peak memory", short(account.get("peak_memory_bytes"), "B")),
        ("parameters", short(account.get("trainable_parameters"))),
    )
    return Cell(f"{rate:.1f} images/s", [f"{value} {of}" for of, value in told if value != "–"])


def origin(stage: StageResult) -> str:
    """How a stage was made, and whether it is finished."""
    if stage.algorithm is None:
        return ""
    words = f"{stage.algorithm} from {stage.parent}"
    if stage.account:
        return words
    last = max((row["step"] for row in stage.metrics), default=None)
    return f"{words}, not begun" if last is None else f"{words}, at step {last}, not finished"


def hours_text(hours: float | None, unit: str) -> str:
    """Hours with three digits, such as ``0.0024 CPU-h`` or ``1,876 GPU-h``; a dash for None."""
    if hours is None:
        return "–"
    if 0 < hours < 0.001:
        return f"< 0.001 {unit}"
    return f"{hours:,.0f} {unit}" if hours >= 100 else f"{hours:.3g} {unit}"


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _sum(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else a + b
