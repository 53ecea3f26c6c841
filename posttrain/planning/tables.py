"""Prints a recipe's needs: memory, time, disk, and the settings that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posttrain.planning.cache_size import cache_bytes
from posttrain.planning.counts import Counts
from posttrain.planning.memory import PARTS
from posttrain.planning.needs import Needs, evaluation_needs, stage_needs
from posttrain.planning.remedies import Remedy, evaluation_remedies, stage_remedies
from posttrain.planning.work import Work
from posttrain.support.wording import duration, short

if TYPE_CHECKING:
    from rich.console import RenderableType

    from posttrain.planning.gpus import Device
    from posttrain.planning.store import Store
    from posttrain.recipe.schema import Recipe

ASSUMED_MFU = 0.4
"""The model FLOPs utilisation of well-made transformer training: 400 of an H100's 989 TFLOP/s."""
DEVICES_PER_MACHINE = 8
"""Assumed number of devices that share one machine's CPU memory."""
NONE = "–"


@dataclass(frozen=True)
class Budget:
    """The devices to plan for, and how well they are used."""

    device: Device
    devices: int
    mfu: float
    mfu_source: str
    """Where the MFU comes from: "assumed", "given", or "measured" and a file."""
    tf32: bool

    def seconds(self, work: Work) -> float:
        """How long ``work`` takes. Recomputation counts as work."""
        device = self.device
        full = device.tf32_flops if self.tf32 else device.fp32_flops
        each = work.low / device.flops + work.full / full
        return each / self.mfu / self.devices

    def host(self, needs: Needs) -> float:
        """Bytes of the CPU's memory on one machine."""
        return needs.memory.host * min(self.devices, DEVICES_PER_MACHINE)


def resources(recipe: Recipe, budget: Budget, *, cuda: bool, store: Store | None = None) -> RenderableType:
    """What every stage and the evaluation need on the budget's devices, and which settings would make them
    fit."""
    counts, limit = Counts(recipe.model, cuda=cuda, store=store), budget.device.usable_bytes
    all_needs = [stage_needs(recipe, stage, counts, budget.devices, limit) for stage in recipe.stages]
    if recipe.evaluation is not None:
        all_needs.append(evaluation_needs(recipe, recipe.evaluation, counts))
    many = f"{budget.devices} x " if budget.devices > 1 else ""
    how = recipe.parallel.described(budget.devices)
    how = "" if how == "single" else f", {how}"
    lines: list[RenderableType] = [
        Text(f"{recipe.name} on {many}{budget.device.name}{how}", style="bold"),
        "",
        _memory(all_needs, budget),
        "",
    ]
    for i, needs in enumerate(all_needs):
        if needs.memory.total > limit:
            names = [stage.name for stage in recipe.stages]
            remedies = (
                stage_remedies(recipe, names[i], counts, budget.devices, limit)
                if i < len(names)
                else evaluation_remedies(recipe, counts, limit)
            )
            lines += [*_advice(needs, remedies, budget), ""]
    return Group(*lines, _time(all_needs, budget), "", *_notes(recipe, all_needs, counts, budget))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _memory(all_needs: list[Needs], budget: Budget) -> Table:
    table = _table("memory", [needs.name for needs in all_needs])
    for part in PARTS:
        table.add_row(part, *(_bytes(needs.memory.parts[part]) for needs in all_needs))
    table.add_row("peak", *(short(needs.memory.total, "B") for needs in all_needs), style="bold")
    shares = []
    for needs in all_needs:
        style = "green" if needs.memory.total <= budget.device.usable_bytes else "bold red"
        shares.append(Text(f"{needs.memory.total / budget.device.memory_bytes:.0%}", style=style))
    table.add_row("of the device", *shares)
    table.add_row("in", *(needs.memory.phase for needs in all_needs))
    if any(needs.memory.host for needs in all_needs):
        table.add_row("host", *(_bytes(budget.host(needs)) for needs in all_needs))
    return table


def _time(all_needs: list[Needs], budget: Budget) -> Table:
    columns = list(all_needs)
    if len(all_needs) > 1:
        rollout = sum((needs.rollout for needs in all_needs), Work())
        training = sum((needs.training for needs in all_needs), Work())
        disk = sum(needs.disk for needs in all_needs)
        columns.append(Needs("together", all_needs[0].memory, rollout, training, disk))
    table = _table("time", [needs.name for needs in columns])

    def share(work_of: Callable[[Needs], Work]) -> list[str]:
        shares = [(budget.seconds(work_of(needs)), budget.seconds(needs.work)) for needs in columns]
        return [f"{one / all_:.0%}" if all_ else NONE for one, all_ in shares]

    seconds = [budget.seconds(needs.work) for needs in columns]
    flops = [needs.work.low + needs.work.full for needs in columns]
    table.add_row("work", *(short(value, "FLOP") if value else NONE for value in flops))
    table.add_row("rollout", *share(lambda needs: needs.rollout))
    table.add_row("training", *share(lambda needs: needs.training))
    table.add_row("time", *(duration(value) if value else NONE for value in seconds), style="bold")
    table.add_row("GPU-hours", *(_hours(value * budget.devices / 3600) for value in seconds))
    table.add_row("disk", *(_bytes(needs.disk) for needs in columns))
    return table


def _hours(value: float) -> str:
    if not value:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "0"


def _bytes(value: float) -> str:
    return short(value, "B") if value else NONE


def _advice(needs: Needs, remedies: list[Remedy], budget: Budget) -> list[RenderableType]:
    limit, name = budget.device.usable_bytes, needs.name
    over = f"{short(needs.memory.total, 'B')} of {short(limit, 'B')} usable"
    lines: list[RenderableType] = [Text(f"{name} does not fit ({over}).", style="bold red")]
    if not remedies or remedies[0].needs.memory.total > limit:
        least = f"; the least is {short(remedies[0].needs.memory.total, 'B')}" if remedies else ""
        return [*lines, f"No change of its settings makes it fit{least}: take a larger GPU, or more of them."]
    lines.append("It would with one of:" if len(remedies) > 1 else "It would with:")
    for remedy in remedies:
        host = f", host {short(budget.host(remedy.needs), 'B')}" if remedy.needs.memory.host else ""
        offer = Text(f"{short(remedy.needs.memory.total, 'B')}{host}: {remedy.price}")
        lines.append(Padding(offer, (0, 0, 0, 2), expand=False))
        lines += [Text(f"    --set {_quoted(s)}", style="cyan", no_wrap=True) for s in remedy.settings]
    return lines


def _quoted(setting: str) -> str:
    field, _, value = setting.partition("=")
    return f"{field}='{value}'" if " " in value else setting


def _notes(recipe: Recipe, all_needs: list[Needs], counts: Counts, budget: Budget) -> list[RenderableType]:
    notes: list[RenderableType] = []
    for needs in all_needs:
        if needs.auto_micro_batch is not None:
            line = (
                f"{needs.name}: micro_batch auto is planned as {needs.auto_micro_batch}, the most that fits; "
                "a run takes fewer if more are no faster."
            )
            notes.append(Text(line))
    if recipe.cache.prompts or recipe.cache.latents != "off":
        size = cache_bytes(recipe, counts)
        amount = "unknown, because some data are not here" if size is None else f"at most {short(size, 'B')}"
        notes.append(Text(f"cache: its size is {amount}."))
    if recipe.evaluation is not None and not (all_needs[-1].work.low or all_needs[-1].work.full):
        notes.append(
            Text("evaluation: its prompts are not on this machine, so its time is unknown.", style="yellow")
        )
    device = budget.device
    legend = (
        f"memory: on each device, in its largest phase; {device.reserved:.0%} of "
        f"{short(device.memory_bytes, 'B')} is left for the system. "
    )
    if any(needs.memory.host for needs in all_needs):
        machines = f" with {DEVICES_PER_MACHINE} devices" if budget.devices > DEVICES_PER_MACHINE else ""
        legend += f"host: the CPU's memory of one machine{machines}. "
    legend += (
        f"time: FLOPs counted, at an MFU of {budget.mfu:.0%} ({budget.mfu_source}) of "
        f"{short(device.flops, 'FLOP/s')} ({device.source}); loading, reading images and rewards' networks "
        "are not included. disk: checkpoints and artifacts."
    )
    return [*notes, Text(legend, style="dim")]
