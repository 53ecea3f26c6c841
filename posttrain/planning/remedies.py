"""Finds settings that make a stage, or the evaluation, fit, from the cheapest to the dearest.

A remedy is a list of arguments of ``--set``, applied as ``--set`` applies them, so no remedy breaks the
schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.errors import RecipeError
from posttrain.planning.needs import Needs, evaluation_needs, stage_needs
from posttrain.recipe.file import overridden
from posttrain.stages.processes import check_processes
from posttrain.support.wording import short

if TYPE_CHECKING:
    from posttrain.planning.counts import Counts
    from posttrain.policy.packed import Packing
    from posttrain.recipe.schema import Recipe, Stage

MOST_REMEDIES = 3
PACKINGS: dict[Packing, str] = {
    "int8": "frozen weights rounded to 8 bits",
    "nf4": "frozen weights rounded to 4 bits",
}
SLOWER = "changes no result, a little slower"
"""The price of a smaller micro-batch alone."""


@dataclass(frozen=True)
class Remedy:
    """Settings that lower the needs, their price in words, and the needs with them."""

    settings: tuple[str, ...]
    """Arguments of ``--set``."""
    price: str
    needs: Needs


@dataclass(frozen=True)
class Change:
    """A setting that lowers the needs, and its price in words."""

    setting: str
    """An argument of ``--set``."""
    price: str

    @property
    def field(self) -> str:
        """The field that is set."""
        return self.setting.partition("=")[0]


NeedsOf = Callable[["Recipe"], Needs]
"""What the stage, or the evaluation, of a changed recipe needs."""


def stage_remedies(recipe: Recipe, name: str, counts: Counts, devices: int, limit: float) -> list[Remedy]:
    """Up to three remedies with which the stage needs at most ``limit`` bytes on a device, cheapest first.

    If there is none, the single remedy that needs least.
    """

    def stage_of(changed: Recipe) -> Stage:
        return next(stage for stage in changed.stages if stage.name == name)

    def needed(changed: Recipe) -> Needs:
        check_processes(changed, devices)
        return stage_needs(changed, stage_of(changed), counts, devices, limit)

    size = stage_of(recipe).train.micro_batch
    smaller = [] if size == "auto" else [f"stages.{name}.train.micro_batch={n}" for n in _halves(size)]
    changes = list(_changes(recipe, stage_of(recipe), counts, devices))
    return _Search(recipe, changes, smaller, needed, limit).remedies()


def evaluation_remedies(recipe: Recipe, counts: Counts, limit: float) -> list[Remedy]:
    """Remedies for the evaluation, as :func:`stage_remedies`."""

    def needed(changed: Recipe) -> Needs:
        assert changed.evaluation is not None, "no change removes the evaluation"
        return evaluation_needs(changed, changed.evaluation, counts)

    assert recipe.evaluation is not None, "only called if there is one"
    smaller = [f"evaluation.batch_size={n}" for n in _halves(recipe.evaluation.batch_size)]
    changes = [*_prompt_cache(recipe, counts), *_offload(recipe, counts)]
    return _Search(recipe, changes, smaller, needed, limit).remedies()


class _Search:
    """Finds the smallest sets of changes that make something fit.

    ``changes`` are ordered from cheap to dear; ``smaller`` are settings of ever smaller micro-batches or
    batches.
    """

    def __init__(
        self,
        recipe: Recipe,
        changes: Sequence[Change],
        smaller: Sequence[str],
        needed: NeedsOf,
        limit: float,
    ) -> None:
        self.recipe, self.changes, self.smaller = recipe, changes, smaller
        self.needed, self.limit = needed, limit
        self._tried: dict[frozenset[Change], Remedy | None] = {}

    def remedies(self) -> list[Remedy]:
        """Up to MOST_REMEDIES that fit, each with a dearer dearest change; else the one that needs least."""
        fitting: list[list[Change]] = [[]] if self._fits([]) else []
        for rank in range(len(self.changes)):
            chosen = self._all_up_to(rank)
            if not self._fits(chosen):
                continue
            chosen = self._fewest(chosen)
            if not any(set(before) <= set(chosen) for before in fitting if before):
                fitting.append(chosen)
            if len(fitting) == MOST_REMEDIES:
                break
        if not fitting:
            tried = [remedy for remedy in self._tried.values() if remedy is not None]
            return sorted(tried, key=lambda remedy: remedy.needs.memory.total)[:1]
        return [remedy for chosen in fitting if (remedy := self._remedy(chosen)) is not None]

    def _all_up_to(self, rank: int) -> list[Change]:
        """The change of that rank, and all cheaper ones that go with it: if these do not suffice, fewer do
        not."""
        chosen = [self.changes[rank]]
        for change in reversed(self.changes[:rank]):
            if change.field not in {c.field for c in chosen} and self._remedy([*chosen, change]) is not None:
                chosen.append(change)
        return chosen

    def _fewest(self, chosen: list[Change]) -> list[Change]:
        """``chosen`` without the changes that are not needed. The dear ones go first, and a cheaper value of
        the same field replaces a dear one if that suffices."""
        for change in chosen[1:]:
            others = [c for c in chosen if c != change]
            cheaper = [c for c in self.changes[: self.changes.index(change)] if c.field == change.field]
            candidates = [others, *([*others, c] for c in cheaper)]
            chosen = next((fewer for fewer in candidates if self._fits(fewer)), chosen)
        return chosen

    def _fits(self, chosen: Sequence[Change]) -> bool:
        return (remedy := self._remedy(chosen)) is not None and remedy.needs.memory.total <= self.limit

    def _remedy(self, chosen: Sequence[Change]) -> Remedy | None:
        """The changes with as large micro-batches as fit; None if the schema or the processes refuse them."""
        if (key := frozenset(chosen)) in self._tried:
            return self._tried[key]
        settings = tuple(change.setting for change in self.changes if change in key)
        price = "; ".join(change.price for change in self.changes if change in key) or SLOWER
        self._tried[key] = None
        for size in [*([()] if chosen else []), *((setting,) for setting in self.smaller)]:
            if (needs := self._needs(settings + size)) is None:
                break
            self._tried[key] = Remedy(settings + size, price, needs)
            if needs.memory.total <= self.limit:
                break
        return self._tried[key]

    def _needs(self, settings: Sequence[str]) -> Needs | None:
        try:
            return self.needed(overridden(self.recipe, settings))
        except RecipeError:
            return None


def _changes(recipe: Recipe, stage: Stage, counts: Counts, devices: int) -> Iterator[Change]:
    """The changes that a stage allows, the cheapest first."""
    train, parallel = f"stages.{stage.name}.train", recipe.parallel
    shares = parallel.shares(devices)
    yield from _prompt_cache(recipe, counts)
    if stage.train.gradient_checkpointing == "off":
        yield Change(f"{train}.gradient_checkpointing=selective", "a little more time for training")
    yield from _offload(recipe, counts)
    if stage.train.gradient_checkpointing not in ("full", "auto"):
        yield Change(f"{train}.gradient_checkpointing=full", "a third more time for training")
    if stage.train.sample_every is not None:
        yield Change(f"{train}.sample_every=null", "no image grids while it trains")
    if stage.train.precision == "fp32":
        yield Change(f"{train}.precision=bf16", "rounding to bf16")
    if devices > 1 and shares.weights.fraction == 1:
        yield Change("parallel={strategy: fsdp2}", "weights travel between devices")
    if stage.train.optimizer == "adamw":
        yield Change(f"{train}.optimizer=adamw8bit", "moments rounded to 8 bits")
    if counts.cuda and not shares.moments.on_host:
        yield Change(
            "parallel={strategy: deepspeed, zero_stage: 2, offload: true}",
            "the CPU takes the optimizer's steps",
        )
    if counts.cuda and not shares.weights.on_host:
        yield Change(
            "parallel={strategy: fsdp2, offload: true}",
            "the CPU takes the optimizer's steps, and weights come from its memory for each forward",
        )
    if stage.tune.type != "lora":
        yield Change(f"stages.{stage.name}.tune.type=lora", "another training: an adapter")
        return
    for packing, price in PACKINGS.items():
        if stage.tune.packing is None:
            yield Change(f"stages.{stage.name}.tune.base={packing}", price)


def _prompt_cache(recipe: Recipe, counts: Counts) -> Iterator[Change]:
    rests = [counts.cuda and recipe.model.rests("prompts", cached=cached) for cached in (False, True)]
    if not recipe.cache.prompts and rests == [False, True]:
        each = short(counts.condition_bytes(), "B")
        yield Change("cache.prompts=true", f"{each} of disk for each prompt")


def _offload(recipe: Recipe, counts: Counts) -> Iterator[Change]:
    if counts.cuda and recipe.model.offloaded() is not None:
        yield Change("model.offload=true", "text encoders and VAE travel for each batch")


def _halves(size: int) -> list[int]:
    return [size // 2**i for i in range(1, size.bit_length())]
