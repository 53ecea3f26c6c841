"""A recipe's needs as a person reads them: memory, time, disk, and what to change where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from posttrain.planning.counts import Counts
from posttrain.planning.needs import Needs, Spread, Work, evaluation_needs, stage_needs
from posttrain.planning.remedies import Remedy, evaluation_remedy, remedies
from posttrain.results import duration, short

if TYPE_CHECKING:
    from rich.console import RenderableType

    from posttrain.planning.gpus import Device
    from posttrain.recipe import Recipe

ASSUMED_MFU = 0.4
"""400 TFLOP/s on an H100, whose data sheet says 989: what well-made training of transformers sustains."""


@dataclass(frozen=True)
class Budget:
    """What to plan for."""

    device: Device
    spread: Spread
    mfu: float
    mfu_source: str
    """Where the MFU is from: "assumed", "given" or a file."""
    tf32: bool

    def seconds(self, work: Work) -> float:
        """How long ``work`` takes, recomputation being work like any other."""
        device = self.device
        full = device.tf32_flops if self.tf32 else device.fp32_flops
        each = work.low / device.flops + work.full / full
        return each / self.mfu / self.spread.devices


def resources(recipe: Recipe, budget: Budget, *, cuda: bool) -> RenderableType:
    """What every stage and the evaluation need on the budget's devices, and what would make them fit."""
    counts = Counts(recipe.model, cuda=cuda)
    found = [stage_needs(recipe, stage, counts, budget.spread) for stage in recipe.stages]
    if recipe.evaluation is not None:
        found.append(evaluation_needs(recipe, recipe.evaluation, counts))
    device, devices = budget.device, budget.spread.devices
    spread = f", {budget.spread.strategy}" if devices > 1 else ""
    title = f"{recipe.name} on {f'{devices} x ' if devices > 1 else ''}{device.name}{spread}"
    lines: list[RenderableType] = [Text(title, style="bold"), "", _memory(found, budget), ""]
    for needs in found:
        if needs.memory.total > device.usable_bytes:
            lines += [*_advice(recipe, needs, counts, budget), ""]
    lines += [_time(found, budget), "", *_notes(recipe, found, budget)]
    return Group(*lines)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _memory(found: list[Needs], budget: Budget) -> Table:
    table = _table(
        "memory", "weights", "gradients", "optimizer", "roles", "activations", "caches", "peak", "of it", "in"
    )
    for needs in found:
        memory = needs.memory
        fits = memory.total <= budget.device.usable_bytes
        share = Text(
            f"{memory.total / budget.device.memory_bytes:.0%}", style="green" if fits else "bold red"
        )
        parts = [short(value, "B") if value else "–" for value in memory.parts.values()]
        table.add_row(needs.name, *parts, short(memory.total, "B"), share, memory.phase)
    return table


def _time(found: list[Needs], budget: Budget) -> Table:
    table = _table("time", "work", "rollout", "training", "hours", "GPU-hours", "disk")
    rows = [(needs.name, needs.rollout, needs.training, needs.disk) for needs in found]
    if len(rows) > 1:
        rollout = sum((needs.rollout for needs in found), Work())
        training = sum((needs.training for needs in found), Work())
        rows.append(("together", rollout, training, sum(needs.disk for needs in found)))
    for name, rollout, training, disk in rows:
        seconds = [budget.seconds(work) for work in (rollout, training)]
        total, work = sum(seconds), rollout + training
        shares = [f"{part / total:.0%}" if total else "–" for part in seconds]
        hours = [duration(total), f"{total * budget.spread.devices / 3600:.3g}"]
        table.add_row(
            name, short(work.low + work.full, "FLOP"), *shares, *hours, short(disk, "B") if disk else "–"
        )
    return table


def _advice(recipe: Recipe, needs: Needs, counts: Counts, budget: Budget) -> list[RenderableType]:
    limit, name = budget.device.usable_bytes, needs.name
    over = f"{short(needs.memory.total, 'B')} of {short(limit, 'B')} usable"
    head = Text(f"{name} does not fit ({over}).", style="bold red")
    found: list[Remedy]
    stage = next((stage for stage in recipe.stages if stage.name == name), None)
    if stage is None:
        found = [remedy] if (remedy := evaluation_remedy(recipe, counts, limit)) is not None else []
    else:
        found = remedies(recipe, stage, counts, budget.spread, limit)
    if not found or found[0].needs.memory.total > limit:
        least = f"; the least is {short(found[0].needs.memory.total, 'B')}" if found else ""
        return [head, f"  No change of its settings makes it fit{least}: take a larger GPU, or more of them"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for remedy in found:
        settings = "\n".join(remedy.settings)
        table.add_row(
            f"  {settings}".replace("\n", "\n  "), short(remedy.needs.memory.total, "B"), remedy.price
        )
    return [head, "It would with one of:", table]


def _notes(recipe: Recipe, found: list[Needs], budget: Budget) -> list[RenderableType]:
    device = budget.device
    words = (
        f"memory: of each device, in the phase that needs most; {device.reserved:.0%} of "
        f"{short(device.memory_bytes, 'B')} is left for the system. time: FLOPs counted, at an MFU of "
        f"{budget.mfu:.0%} ({budget.mfu_source}) of {short(device.flops, 'FLOP/s')} ({device.source}); "
        "loading, reading images and rewards' networks are not in it. disk: checkpoints and artifacts."
    )
    notes: list[RenderableType] = [Text(words, style="dim")]
    if recipe.evaluation is not None and not (found[-1].work.low or found[-1].work.full):
        notes.append(Text("evaluation: its prompts are not here, so its time is unknown", style="yellow"))
    return notes
