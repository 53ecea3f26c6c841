"""Prints a recipe's needs: memory, time, disk, and the settings that would make it fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from posttrain.planning.budget import DEVICES_PER_MACHINE, Budget
from posttrain.planning.cache_size import cache_bytes
from posttrain.planning.counts import Counts
from posttrain.planning.layout import amount, offer, table
from posttrain.planning.memory import PARTS
from posttrain.planning.needs import Needs, evaluation_needs, stage_needs
from posttrain.planning.remedies import Remedy, evaluation_remedies, stage_remedies
from posttrain.planning.speed import Faster, speedups
from posttrain.planning.timing import time_sources, time_table
from posttrain.support.wording import short

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from posttrain.planning.store import Store
    from posttrain.recipe.schema import Recipe


def resources(recipe: Recipe, budget: Budget, *, cuda: bool, store: Store | None = None) -> RenderableType:
    """What every stage and the evaluation need on the budget's devices, and which settings would make them
    fit."""
    counts, limit = Counts(recipe.model, cuda=cuda, store=store), budget.device.usable_bytes
    all_needs = [stage_needs(recipe, stage, counts, budget.devices, limit) for stage in recipe.stages]
    if recipe.evaluation is not None:
        all_needs.append(evaluation_needs(recipe, recipe.evaluation, counts))
    many = f"{budget.devices} x " if budget.devices > 1 else ""
    how = recipe.parallel.label(budget.devices)
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
    faster = []
    for stage, needs in zip(recipe.stages, all_needs, strict=False):
        if needs.memory.total <= limit and (found := speedups(recipe, stage, counts, budget, limit)):
            faster += [*_faster(needs, found), ""]
    notes = _notes(recipe, all_needs, counts, budget)
    return Group(*lines, time_table(all_needs, budget), "", *faster, *notes)


def _memory(all_needs: list[Needs], budget: Budget) -> Table:
    made = table("memory", [needs.name for needs in all_needs])
    for part in PARTS:
        made.add_row(part, *(amount(needs.memory.parts[part]) for needs in all_needs))
    made.add_row("peak", *(short(needs.memory.total, "B") for needs in all_needs), style="bold")
    shares = []
    for needs in all_needs:
        style = "green" if needs.memory.total <= budget.device.usable_bytes else "bold red"
        shares.append(Text(f"{needs.memory.total / budget.device.memory_bytes:.0%}", style=style))
    made.add_row("of the device", *shares)
    made.add_row("in", *(needs.memory.phase for needs in all_needs))
    if any(needs.memory.host for needs in all_needs):
        made.add_row("host", *(amount(budget.host(needs)) for needs in all_needs))
    return made


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
        words = f"{short(remedy.needs.memory.total, 'B')}{host}: {remedy.price}"
        lines += offer(words, remedy.settings)
    return lines


def _faster(needs: Needs, found: list[Faster]) -> list[RenderableType]:
    lines: list[RenderableType] = [Text(f"{needs.name} would be faster with:", style="bold")]
    for faster in found:
        upto = "up to " if faster.at_most else ""
        size = short(faster.needs.memory.total, "B")
        lines += offer(f"{upto}{faster.factor:.3g} times as fast, {size}: {faster.price}", faster.settings)
    return lines


def _notes(recipe: Recipe, all_needs: list[Needs], counts: Counts, budget: Budget) -> list[RenderableType]:
    notes: list[RenderableType] = []
    for needs in all_needs:
        if needs.decided is not None:
            notes.append(Text(needs.decided))
    if recipe.cache.prompts or recipe.cache.latents != "off":
        size = cache_bytes(recipe, counts)
        words = "unknown, because some data are not here" if size is None else f"at most {short(size, 'B')}"
        notes.append(Text(f"cache: its size is {words}."))
    if recipe.evaluation is not None and not budget.seconds(all_needs[-1]):
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
        f"time: FLOPs counted over FLOP/s; peak {short(device.flops, 'FLOP/s')} ({device.source}); loading, "
        "reading images and rewards' networks are not included. disk: checkpoints and artifacts."
    )
    notes += time_sources(all_needs, budget)
    return [*notes, Text(legend, style="dim")]
