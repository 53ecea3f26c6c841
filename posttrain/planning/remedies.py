"""Which settings would make a stage fit? Tried in the order of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from posttrain.planning.needs import Needs, Spread, evaluation_needs, stage_needs
from posttrain.tuning import Lora

if TYPE_CHECKING:
    from posttrain.planning.counts import Counts
    from posttrain.recipe import Recipe, Stage

SHOWN = 3


@dataclass(frozen=True)
class Remedy:
    """Settings with which a stage needs less."""

    settings: tuple[str, ...]
    """As ``--set`` takes them, or as an option of the plan."""
    price: str
    needs: Needs


Change = Callable[["Stage", Spread], tuple["Stage", Spread] | None]


def remedies(recipe: Recipe, stage: Stage, counts: Counts, spread: Spread, limit: float) -> list[Remedy]:
    """The first few changes after which ``stage`` needs at most ``limit`` bytes a device; the cheapest first.

    Where nothing does, the one that needs least, alone.
    """
    found: list[Remedy] = []
    least: Remedy | None = None
    taken: list[set[str]] = []
    for names in _choices():
        if any(before <= set(names) for before in taken):
            continue  # more than what was enough
        changed, over, settings = stage, spread, []
        for name in names:
            setting, _, change = CHANGES[name]
            if (result := change(changed, over)) is None:
                break
            changed, over = result
            settings.append(setting.format(stage=stage.name, devices=spread.devices))
        else:
            price = "; ".join(CHANGES[name][1] for name in names) or "changes no result, a little slower"
            for smaller in _micro_batches(changed, bool(names)):
                needs = stage_needs(recipe, smaller, counts, over)
                micro = smaller.train.micro_batch
                set_ = [f"--set stages.{stage.name}.train.micro_batch={micro}"] * (
                    micro != stage.train.micro_batch
                )
                remedy = Remedy((*settings, *set_), price, needs)
                if least is None or needs.memory.total < least.needs.memory.total:
                    least = remedy
                if needs.memory.total <= limit:
                    found.append(remedy)
                    taken.append(set(names))
                    break
        if len(found) == SHOWN:
            break
    return found or ([least] if least is not None else [])


def evaluation_remedy(recipe: Recipe, counts: Counts, limit: float) -> Remedy | None:
    """The largest smaller batch with which the evaluation needs at most ``limit`` bytes."""
    evaluation = recipe.evaluation
    assert evaluation is not None, "asked where there is one"
    size = evaluation.batch_size
    while size > 1:
        size //= 2
        needs = evaluation_needs(recipe, evaluation.model_copy(update={"batch_size": size}), counts)
        if needs.memory.total <= limit:
            return Remedy((f"--set evaluation.batch_size={size}",), "changes no result", needs)
    return None


def _train(**settings: object) -> Change:
    def change(stage: Stage, spread: Spread) -> tuple[Stage, Spread] | None:
        if all(getattr(stage.train, name) == value for name, value in settings.items()):
            return None
        return stage.model_copy(update={"train": stage.train.model_copy(update=settings)}), spread

    return change


def _lora(stage: Stage, spread: Spread) -> tuple[Stage, Spread] | None:
    if stage.tune.type == "lora":
        return None
    return stage.model_copy(update={"tune": Lora.model_validate({})}), spread


def _sharded(stage: Stage, spread: Spread) -> tuple[Stage, Spread] | None:
    sharded = spread.devices == 1 or spread.strategy in ("fsdp2", "deepspeed")
    return None if sharded else (stage, replace(spread, strategy="fsdp2"))


CHANGES: dict[str, tuple[str, str, Change]] = {
    "grids": (
        "--set stages.{stage}.train.sample_every=null",
        "no image grids while it trains",
        _train(sample_every=None),
    ),
    "checkpointing": (
        "--set stages.{stage}.train.gradient_checkpointing=true",
        "a third more time for training",
        _train(gradient_checkpointing=True),
    ),
    "bf16": ("--set stages.{stage}.train.precision=bf16", "rounding to bf16", _train(precision="bf16")),
    "sharding": ("--strategy fsdp2", "weights travel between devices", _sharded),
    "lora": ("--set stages.{stage}.tune.type=lora", "another training: an adapter", _lora),
}
"""Name -> setting, price, change; the cheapest first."""


def _choices() -> Iterator[tuple[str, ...]]:
    """Sets of changes, the cheapest first: what is dearest in a set decides."""
    names = list(CHANGES)
    every = [c for size in range(len(names) + 1) for c in combinations(names, size)]
    yield from sorted(every, key=lambda c: (max(map(names.index, c), default=-1), len(c)))


def _micro_batches(stage: Stage, changed: bool) -> Iterator[Stage]:
    size = stage.train.micro_batch
    sizes = [size] * changed
    while size > 1:
        size //= 2
        sizes.append(size)
    for size in sizes:
        yield stage.model_copy(update={"train": stage.train.model_copy(update={"micro_batch": size})})
