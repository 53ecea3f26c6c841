"""A recipe's needs as a person reads them: memory, time, disk, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.planning.counts import Counts
from posttrain.planning.data import cache_bytes
from posttrain.planning.memory import PARTS
from posttrain.planning.needs import Needs, evaluation_needs, stage_needs
from posttrain.planning.remedies import Remedy, evaluation_remedies, stage_remedies
from posttrain.planning.work import Work
from posttrain.support.wording import duration, short

if TYPE_CHECKING:
    from rich.console import RenderableType

    from posttrain.planning.gpus import Device
    from posttrain.recipe.schema import Recipe

ASSUMED_MFU = 0.4
"""400 TFLOP/s on an H100, whose data sheet says 989: what well-made training of transformers sustains."""
MACHINE = 8
"""Most devices in one machine, for what is said of its memory: an assumption."""
NONE = "–"


@dataclass(frozen=True)
class Budget:
    """What to plan for."""

    device: Device
    devices: int
    mfu: float
    mfu_source: str
    """Where the MFU is from: "assumed", "given" or a file."""
    tf32: bool

    def seconds(self, work: Work) -> float:
        """How long ``work`` takes, recomputation being work like any other."""
        device = self.device
        full = device.tf32_flops if self.tf32 else device.fp32_flops
        each = work.low / device.flops + work.full / full
        return each / self.mfu / self.devices

    def host(self, needs: Needs) -> float:
        """Bytes in the CPU's memory of one machine."""
        return needs.memory.host * min(self.devices, MACHINE)


def resources(recipe: Recipe, budget: Budget, *, cuda: bool) -> RenderableType:
    """What every stage and the evaluation need on the budget's devices, and what would make them fit."""
    counts, limit = Counts(recipe.model, cuda=cuda), budget.device.usable_bytes
    found = [stage_needs(recipe, stage, counts, budget.devices, limit) for stage in recipe.stages]
    if recipe.evaluation is not None:
        found.append(evaluation_needs(recipe, recipe.evaluation, counts))
    many = f"{budget.devices} x " if budget.devices > 1 else ""
    how = recipe.parallel.described(budget.devices)
    how = "" if how == "single" else f", {how}"
    lines: list[RenderableType] = [
        Text(f"{recipe.name} on {many}{budget.device.name}{how}", style="bold"),
        "",
        _memory(found, budget),
        "",
    ]
    for i, needs in enumerate(found):
        if needs.memory.total > limit:
            names = [stage.name for stage in recipe.stages]
            remedies = (
                stage_remedies(recipe, names[i], counts, budget.devices, limit)
                if i < len(names)
                else evaluation_remedies(recipe, counts, limit)
            )
            lines += [*_advice(needs, remedies, budget), ""]
    return Group(*lines, _time(found, budget), "", *_notes(recipe, found, counts, budget))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _memory(found: list[Needs], budget: Budget) -> Table:
    table = _table("memory", [needs.name for needs in found])
    for part in PARTS:
        table.add_row(part, *(_bytes(needs.memory.parts[part]) for needs in found))
    table.add_row("peak", *(short(needs.memory.total, "B") for needs in found), style="bold")
    shares = []
    for needs in found:
        style = "green" if needs.memory.total <= budget.device.usable_bytes else "bold red"
        shares.append(Text(f"{needs.memory.total / budget.device.memory_bytes:.0%}", style=style))
    table.add_row("of the device", *shares)
    table.add_row("in", *(needs.memory.phase for needs in found))
    if any(needs.memory.host for needs in found):
        table.add_row("host", *(_bytes(budget.host(needs)) for needs in found))
    return table


def _time(found: list[Needs], budget: Budget) -> Table:
    every = list(found)
    if len(found) > 1:
        rollout = sum((needs.rollout for needs in found), Work())
        training = sum((needs.training for needs in found), Work())
        disk = sum(needs.disk for needs in found)
        every.append(Needs("together", found[0].memory, rollout, training, disk))
    table = _table("time", [needs.name for needs in every])

    def share(part: Callable[[Needs], Work]) -> list[str]:
        shares = [(budget.seconds(part(needs)), budget.seconds(needs.work)) for needs in every]
        return [f"{one / all_:.0%}" if all_ else NONE for one, all_ in shares]

    seconds = [budget.seconds(needs.work) for needs in every]
    flops = [needs.work.low + needs.work.full for needs in every]
    table.add_row("work", *(short(value, "FLOP") if value else NONE for value in flops))
    table.add_row("rollout", *share(lambda needs: needs.rollout))
    table.add_row("training", *share(lambda needs: needs.training))
    table.add_row("time", *(duration(value) if value else NONE for value in seconds), style="bold")
    table.add_row("GPU-hours", *(_hours(value * budget.devices / 3600) for value in seconds))
    table.add_row("disk", *(_bytes(needs.disk) for needs in every))
    return table


def _hours(value: float) -> str:
    if not value:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "0"


def _bytes(value: float) -> str:
    return short(value, "B") if value else NONE


def _advice(needs: Needs, found: list[Remedy], budget: Budget) -> list[RenderableType]:
    limit, name = budget.device.usable_bytes, needs.name
    over = f"{short(needs.memory.total, 'B')} of {short(limit, 'B')} usable"
    lines: list[RenderableType] = [Text(f"{name} does not fit ({over}).", style="bold red")]
    if not found or found[0].needs.memory.total > limit:
        least = f"; the least is {short(found[0].needs.memory.total, 'B')}" if found else ""
        return [*lines, f"No change of its settings makes it fit{least}: take a larger GPU, or more of them."]
    lines.append("It would with one of:" if len(found) > 1 else "It would with:")
    for remedy in found:
        host = f", host {short(budget.host(remedy.needs), 'B')}" if remedy.needs.memory.host else ""
        words = f"{short(remedy.needs.memory.total, 'B')}{host}: {remedy.price}"
        lines.append(Padding(Text(words), (0, 0, 0, 2), expand=False))
        lines += [Text(f"    --set {_quoted(s)}", style="cyan", no_wrap=True) for s in remedy.settings]
    return lines


def _quoted(setting: str) -> str:
    field, _, value = setting.partition("=")
    return f"{field}='{value}'" if " " in value else setting


def _notes(recipe: Recipe, found: list[Needs], counts: Counts, budget: Budget) -> list[RenderableType]:
    notes: list[RenderableType] = []
    for needs in found:
        if needs.found is not None:
            words = f"{needs.name}: micro_batch auto is planned as {needs.found}, the most that fits; a run "
            notes.append(Text(f"{words}takes fewer where more are no faster."))
    if recipe.cache.prompts or recipe.cache.latents != "off":
        size = cache_bytes(recipe, counts)
        words = "unknown, since not all data are here" if size is None else f"at most {short(size, 'B')}"
        notes.append(Text(f"cache: its size is {words}."))
    if recipe.evaluation is not None and not (found[-1].work.low or found[-1].work.full):
        notes.append(Text("evaluation: its prompts are not here, so its time is unknown.", style="yellow"))
    device = budget.device
    words = (
        f"memory: of each device, in the phase that needs most; {device.reserved:.0%} of "
        f"{short(device.memory_bytes, 'B')} is left for the system. "
    )
    if any(needs.memory.host for needs in found):
        machines = f", of which one has {MACHINE} devices" if budget.devices > MACHINE else ""
        words += f"host: the CPU's memory of a machine{machines}. "
    words += (
        f"time: FLOPs counted, at an MFU of {budget.mfu:.0%} ({budget.mfu_source}) of "
        f"{short(device.flops, 'FLOP/s')} ({device.source}); loading, reading images and rewards' networks "
        "are not in it. disk: checkpoints and artifacts."
    )
    return [*notes, Text(words, style="dim")]
