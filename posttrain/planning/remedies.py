"""Which settings would make a stage, or the evaluation, fit? Tried in the order of what they cost.

A remedy is what ``--set`` takes, applied as ``--set`` applies it, so what the schema refuses is not proposed.
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
    from posttrain.recipe.schema import Recipe, Stage

SHOWN = 3
SLOWER = "changes no result, a little slower"


@dataclass(frozen=True)
class Remedy:
    """Settings with which something needs less."""

    settings: tuple[str, ...]
    """As ``--set`` takes them."""
    price: str
    needs: Needs


@dataclass(frozen=True)
class Change:
    """A setting that makes a stage need less."""

    setting: str
    """As ``--set`` takes it."""
    price: str

    @property
    def field(self) -> str:
        """What is set."""
        return self.setting.partition("=")[0]


Needed = Callable[["Recipe"], Needs]


def stage_remedies(recipe: Recipe, name: str, counts: Counts, devices: int, limit: float) -> list[Remedy]:
    """The first few changes after which the stage needs at most ``limit`` bytes a device; the cheapest first.

    Where nothing does, the one that needs least, alone.
    """

    def stage_of(changed: Recipe) -> Stage:
        return next(stage for stage in changed.stages if stage.name == name)

    def needed(changed: Recipe) -> Needs:
        check_processes(changed, devices)
        return stage_needs(changed, stage_of(changed), counts, devices, limit)

    size = stage_of(recipe).train.micro_batch
    smaller = [] if size == "auto" else [f"stages.{name}.train.micro_batch={n}" for n in _halves(size)]
    changes = list(_changes(recipe, stage_of(recipe), counts, devices))
    return _found(recipe, changes, smaller, needed, limit)


def evaluation_remedies(recipe: Recipe, counts: Counts, limit: float) -> list[Remedy]:
    """The same for the evaluation."""

    def needed(changed: Recipe) -> Needs:
        assert changed.evaluation is not None, "no change removes it"
        return evaluation_needs(changed, changed.evaluation, counts)

    assert recipe.evaluation is not None, "asked where there is one"
    smaller = [f"evaluation.batch_size={n}" for n in _halves(recipe.evaluation.batch_size)]
    changes = [*_prompt_cache(recipe, counts), *_offload(recipe, counts)]
    return _found(recipe, changes, smaller, needed, limit)


def _found(
    recipe: Recipe, changes: Sequence[Change], smaller: Sequence[str], needed: Needed, limit: float
) -> list[Remedy]:
    """The cheapest set of changes whose dearest is none, the first of ``changes``, the second, and so on."""
    tried: dict[frozenset[Change], Remedy | None] = {}

    def applied(settings: Sequence[str]) -> Needs | None:
        try:
            return needed(overridden(recipe, settings))
        except RecipeError:
            return None

    def remedy(chosen: Sequence[Change]) -> Remedy | None:
        """With as large micro-batches as fit; None where the schema, or the processes, refuse it."""
        if (key := frozenset(chosen)) in tried:
            return tried[key]
        settings = tuple(change.setting for change in changes if change in key)
        price = "; ".join(change.price for change in changes if change in key) or SLOWER
        tried[key] = None
        for size in [*([()] if chosen else []), *((text,) for text in smaller)]:
            if (needs := applied(settings + size)) is None:
                break
            tried[key] = Remedy(settings + size, price, needs)
            if needs.memory.total <= limit:
                break
        return tried[key]

    def fits(chosen: Sequence[Change]) -> bool:
        return (found := remedy(chosen)) is not None and found.needs.memory.total <= limit

    sets: list[list[Change]] = [[]] if fits([]) else []
    for i, dearest in enumerate(changes):
        chosen = [dearest]
        for change in reversed(changes[:i]):  # all that go together: if they do not suffice, fewer do not
            if change.field not in {c.field for c in chosen} and remedy([*chosen, change]) is not None:
                chosen.append(change)
        if not fits(chosen):
            continue
        for change in chosen[1:]:  # the dear ones are let go of first
            others = [c for c in chosen if c != change]
            cheaper = [c for c in changes[: changes.index(change)] if c.field == change.field]
            chosen = next((few for few in [others, *([*others, c] for c in cheaper)] if fits(few)), chosen)
        if not any(set(before) <= set(chosen) for before in sets if before):
            sets.append(chosen)
        if len(sets) == SHOWN:
            break
    every = [found for found in tried.values() if found is not None]
    if not sets:
        return sorted(every, key=lambda found: found.needs.memory.total)[:1]
    return [found for chosen in sets if (found := remedy(chosen)) is not None]


def _changes(recipe: Recipe, stage: Stage, counts: Counts, devices: int) -> Iterator[Change]:
    """What can be changed of a stage, the cheapest first."""
    train, parallel = f"stages.{stage.name}.train", recipe.parallel
    shares = parallel.shares(devices)
    yield from _prompt_cache(recipe, counts)
    if stage.train.gradient_checkpointing == "off":
        yield Change(f"{train}.gradient_checkpointing=selective", "a little more time for training")
    yield from _offload(recipe, counts)
    if stage.train.gradient_checkpointing != "full":
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


def _prompt_cache(recipe: Recipe, counts: Counts) -> Iterator[Change]:
    rests = [counts.cuda and recipe.model.rests("prompts", cached=cached) for cached in (False, True)]
    if not recipe.cache.prompts and rests == [False, True]:
        each = sum(tensor.nbytes for tensor in counts.condition(1).values())
        yield Change("cache.prompts=true", f"{short(each, 'B')} of disk for each prompt")


def _offload(recipe: Recipe, counts: Counts) -> Iterator[Change]:
    if counts.cuda and recipe.model.offloaded() is not None:
        yield Change("model.offload=true", "text encoders and VAE travel for each batch")


def _halves(size: int) -> list[int]:
    return [size // 2**i for i in range(1, size.bit_length())]
