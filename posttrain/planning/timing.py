"""Prints the time that a recipe needs, and the measured rates that it is counted from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from posttrain.planning.budget import ASSUMED_MFU, KINDS
from posttrain.planning.layout import NONE, amount, table
from posttrain.planning.rates import Kind
from posttrain.planning.work import Work
from posttrain.support.wording import duration, short

if TYPE_CHECKING:
    from rich.table import Table

    from posttrain.planning.budget import Budget, Pace
    from posttrain.planning.needs import Needs

PARTS: dict[str, tuple[Kind, ...]] = {
    "training": ("training",),
    "rollout": ("rollout",),
    "text, VAE": ("text", "encode", "decode"),
}
"""The lines of the table, and the kinds of work in each."""


@dataclass(frozen=True)
class Column:
    """A stage, the evaluation, or all of them together."""

    name: str
    flops: float
    seconds: dict[Kind, float]
    disk: float

    @property
    def total(self) -> float:
        """Seconds of all kinds of work."""
        return sum(self.seconds.values())


def time_table(all_needs: list[Needs], budget: Budget) -> Table:
    """Work, time and disk of each stage, and of all together."""
    columns = [_column(needs, budget) for needs in all_needs]
    if len(columns) > 1:
        columns.append(
            Column(
                "together",
                sum(column.flops for column in columns),
                {kind: sum(column.seconds[kind] for column in columns) for kind in KINDS},
                sum(column.disk for column in columns),
            )
        )
    made = table("cost", [column.name for column in columns])
    made.add_row("work", *(short(c.flops, "FLOP") if c.flops else NONE for c in columns))
    for name, kinds in PARTS.items():
        made.add_row(name, *(_share(column, kinds) for column in columns))
    made.add_row("time", *(duration(c.total) if c.total else NONE for c in columns), style="bold")
    made.add_row("GPU-hours", *(_hours(c.total * budget.devices / 3600) for c in columns))
    made.add_row("disk", *(amount(column.disk) for column in columns))
    return made


def time_sources(all_needs: list[Needs], budget: Budget) -> Iterator[Text]:
    """A line for each rate that the times are counted from, and for what was assumed."""
    if budget.mfu is not None:
        yield Text(f"time: at an MFU of {budget.mfu:.0%} ({budget.mfu_source}) for all work.")
        return
    uses: dict[Pace, list[str]] = {}
    for needs in all_needs:
        for kind, pace in budget.paces(needs).items():
            uses.setdefault(pace, []).append(f"{needs.name} {kind}")
    assumed = [use for pace, names in uses.items() if pace.row is None for use in names]
    for pace, names in uses.items():
        if pace.row is not None:
            yield Text(f"time of {', '.join(names)}: {_rate_in_words(pace, budget)}")
    if assumed:
        yield Text(
            f"time of {', '.join(assumed)}: no measured row fits; an MFU of {ASSUMED_MFU:.0%} is assumed."
        )
    if not budget.device.bf16:
        why = "it computes bf16 at the speed of float32 or slower."
        yield Text(f"{budget.device.name} has no bf16: {why}", style="yellow")


def _rate_in_words(pace: Pace, budget: Budget) -> str:
    row = pace.row
    assert row is not None, "only called for measured rows"
    peak = budget.device.peak(row.precision)
    share = f"{pace.flops / peak:.1%} of {short(peak, 'FLOP/s')}"
    scaled = ""
    if not budget.is_of(row):
        eager = row.kind in ("step", "sampling") and not row.compile
        scaled = ", which waits for launches as that device" if eager else ", scaled by the peaks"
    return f"{share}{scaled}, from {row}."


def _column(needs: Needs, budget: Budget) -> Column:
    work = sum(needs.works.values(), Work())
    return Column(needs.name, work.low + work.full, budget.seconds_by_kind(needs), needs.disk)


def _share(column: Column, kinds: Iterable[Kind]) -> str:
    return f"{sum(column.seconds[kind] for kind in kinds) / column.total:.0%}" if column.total else NONE


def _hours(value: float) -> str:
    if not value:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "0"
