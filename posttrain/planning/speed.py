"""Finds settings that make a stage faster and still fit, the largest gain first.

A proposal is a list of arguments of ``--set``, applied as ``--set`` applies them, so none breaks the schema.
Its gain follows from the counts and the measured rates: besides single changes, the settings of measured rows
are tried as they are, since their rates need no guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from posttrain.errors import RecipeError
from posttrain.planning.cache_size import encoding_bytes
from posttrain.planning.data import known
from posttrain.planning.encoders import in_cache
from posttrain.planning.needs import Needs, stage_needs
from posttrain.planning.phases import items_in_step
from posttrain.planning.work import Work
from posttrain.recipe.file import overridden
from posttrain.stages.processes import check_processes
from posttrain.support.wording import short

if TYPE_CHECKING:
    from posttrain.planning.budget import Budget
    from posttrain.planning.counts import Counts
    from posttrain.planning.rates import Kind
    from posttrain.recipe.schema import Recipe, Stage

LEAST = 1.05
"""The least gain that is proposed."""
MOST = 4
"""The most proposals of a stage, beside all of them together."""
COMPILES = "compiling takes minutes, and rounding differs"
HARMLESS = "changes no result"


@dataclass(frozen=True)
class Faster:
    """Settings that make a stage faster, their price in words, and the needs with them."""

    settings: tuple[str, ...]
    """Arguments of ``--set``."""
    price: str
    factor: float
    """How many times as fast the stage is."""
    needs: Needs
    at_most: bool = False
    """Whether the gain may be smaller, because the data are not on this machine."""


@dataclass(frozen=True)
class Change:
    """Settings that belong together, and their price in words."""

    settings: tuple[str, ...]
    price: str
    saves: Kind | None = None
    """The work that nearly goes away if images, or prompts, come often; nobody here knows how often."""

    @property
    def fields(self) -> set[str]:
        """The fields that are set."""
        return {setting.partition("=")[0] for setting in self.settings}


def speedups(recipe: Recipe, stage: Stage, counts: Counts, budget: Budget, limit: float) -> list[Faster]:
    """Changes with which ``stage`` is at least LEAST times as fast and needs at most ``limit`` bytes on a
    device; then as many of them together as go together."""
    search = _Search(recipe, stage.name, counts, budget, limit)
    changes = list(_changes(recipe, stage, counts, budget))
    shown: list[tuple[Change, Faster]] = []
    for change, faster in search.gains([], changes):  # of changes of the same fields the one that gains most
        if not any(change.fields == other.fields or _beaten(faster, gain) for other, gain in shown):
            shown.append((change, faster))
    chosen: list[Change] = []
    while more := search.gains(chosen, changes):
        best, _ = more[0]
        chosen.append(best)
    together = search.tried(chosen) if len(chosen) > 1 else None
    return [*(faster for _, faster in shown[:MOST]), *([together] if together else [])]


class _Search:
    """Tries changes of one stage."""

    def __init__(self, recipe: Recipe, name: str, counts: Counts, budget: Budget, limit: float) -> None:
        self.recipe, self.name, self.counts = recipe, name, counts
        self.budget, self.limit = budget, limit
        self.before = budget.seconds(self._needs(recipe))

    def gains(self, chosen: list[Change], changes: Iterable[Change]) -> list[tuple[Change, Faster]]:
        """The changes that gain LEAST or more beside those that are ``chosen``, the largest gain first."""
        fields = {field for change in chosen for field in change.fields}
        base = self.tried(chosen)
        least = LEAST * (base.factor if base else 1)
        found = [
            (change, faster)
            for change in changes
            if not change.fields & fields and (faster := self.tried([*chosen, change])) is not None
        ]
        found = [(change, faster) for change, faster in found if faster.factor >= least]
        return sorted(found, key=lambda pair: (-round(pair[1].factor, 2), len(pair[1].settings)))

    def tried(self, changes: list[Change]) -> Faster | None:
        """The stage with the changes; None if the schema or the processes refuse it, or it does not fit."""
        settings = tuple(setting for change in changes for setting in change.settings)
        try:
            needs = self._needs(overridden(self.recipe, settings))
        except RecipeError:
            return None
        if needs.memory.total > self.limit:
            return None
        saved: set[Kind] = {change.saves for change in changes if change.saves is not None}
        works = {kind: Work() if kind in saved else work for kind, work in needs.works.items()}
        seconds = self.budget.seconds(replace(needs, works=works))
        prices = dict.fromkeys(change.price for change in changes if change.price != HARMLESS)
        price = "; ".join(prices) or HARMLESS
        return Faster(settings, price, self.before / seconds if seconds else 1.0, needs, bool(saved))

    def _needs(self, recipe: Recipe) -> Needs:
        check_processes(recipe, self.budget.devices)
        stage = next(stage for stage in recipe.stages if stage.name == self.name)
        return stage_needs(recipe, stage, self.counts, self.budget.devices, self.limit)


def _beaten(faster: Faster, other: Faster) -> bool:
    """Whether the ``other`` gains as much with fewer settings, all of them among these."""
    return set(other.settings) < set(faster.settings) and other.factor >= faster.factor / 1.01


def _changes(recipe: Recipe, stage: Stage, counts: Counts, budget: Budget) -> Iterator[Change]:
    train, settings = f"stages.{stage.name}.train", stage.train
    most = items_in_step(stage, counts, budget.devices)
    size = settings.micro_batch
    larger = [] if size == "auto" else [size * 2**i for i in range(1, 8) if size * 2**i <= most]
    if not settings.compile:
        yield Change((f"{train}.compile=true",), COMPILES)
    if settings.gradient_checkpointing not in ("off", "auto"):
        yield Change((f"{train}.gradient_checkpointing=off",), HARMLESS)
    for rows in larger:
        yield Change((f"{train}.micro_batch={rows}",), HARMLESS)
    yield from _as_measured(stage, budget, most)
    yield from _caches(recipe, stage, counts)


def _as_measured(stage: Stage, budget: Budget, most: int) -> Iterator[Change]:
    """The settings of measured rows of the same tuning."""
    train, settings = f"stages.{stage.name}.train", stage.train
    now = (settings.compile, str(settings.gradient_checkpointing), settings.micro_batch)
    if "auto" in now[:2]:
        return  # a run tries by itself
    rows = (row for row in budget.rates.rows if row.training and row.tune == stage.tune.type)
    modes = dict.fromkeys((row.compile, row.checkpointing, row.micro_batch) for row in rows)
    for mode in modes:
        compiled, checkpointing, size = mode
        if size > most or (settings.compile and not compiled) or mode == now:
            continue
        changed = []
        if compiled != settings.compile:
            changed.append(f"{train}.compile=true")
        if checkpointing != now[1]:
            changed.append(f"{train}.gradient_checkpointing={checkpointing}")
        if settings.micro_batch not in ("auto", size):
            changed.append(f"{train}.micro_batch={size}")
        if len(changed) > 1:
            yield Change(tuple(changed), COMPILES if compiled != settings.compile else HARMLESS)


def _caches(recipe: Recipe, stage: Stage, counts: Counts) -> Iterator[Change]:
    cached, data = in_cache(recipe, stage), known(stage.data, counts, stage.name)
    if not cached["prompts"]:
        each = short(counts.condition_bytes(), "B")
        unknown: Kind | None = "text" if data.prompts is None else None
        yield Change(("cache.prompts=true",), f"{each} of disk for each prompt", unknown)
    if not cached["images"] and stage.data.images_per_sample:
        side = round((data.size[0] * data.size[1]) ** 0.5)
        price = f"{short(encoding_bytes(counts, 'images', side), 'B')} of disk for each image"
        crops = tuple(
            f"stages.{other.name}.data.{field}={value}"
            for other in recipe.stages
            for field, value in other.data.for_cache().items()
        )
        if crops:
            price += ", central crops"
        unknown = "encode" if data.images is None else None
        yield Change(("cache.latents=mean_logvar", *crops), price, unknown)
