"""Says how a stage would compute on the planned device where its recipe says ``auto``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from posttrain.engine.modes import COMPILED, EAGER
from posttrain.planning.phases import items_in_step

if TYPE_CHECKING:
    from posttrain.planning.counts import Counts
    from posttrain.planning.memory import Memory
    from posttrain.recipe.schema import Stage

NeededBy = Callable[["Stage", int], "Memory"]
"""The memory of a stage with a micro-batch."""


def settled(stage: Stage, counts: Counts, devices: int, limit: float, needed: NeededBy) -> Stage:
    """The stage with a decision for every ``auto`` of ``train``, as a run would take it if it could not try.

    Blocks are compiled on CUDA. Of the ways to checkpoint, the first is taken with which one item, or the
    given micro-batch, needs at most ``limit`` bytes, else the last. The micro-batch is the largest power of
    two with which the stage needs at most ``limit`` bytes.
    """
    given = stage.train.micro_batch
    decided = _with(stage, compile=counts.cuda) if stage.train.compile == "auto" else stage
    if decided.train.gradient_checkpointing == "auto":
        modes = COMPILED if decided.train.compile else EAGER
        for checkpointing in modes if counts.cuda else modes[:1]:
            decided = _with(decided, gradient_checkpointing=checkpointing)
            if needed(decided, 1 if given == "auto" else given).total <= limit:
                break
    if given == "auto":
        chosen, most = 1, items_in_step(stage, counts, devices)
        while 2 * chosen <= most and needed(decided, 2 * chosen).total <= limit:
            chosen *= 2
        decided = _with(decided, micro_batch=chosen)
    return decided


def in_words(given: Stage, decided: Stage) -> str | None:
    """The decisions in a line; None if the recipe left nothing open."""
    names = [name for name in ("compile", "gradient_checkpointing", "micro_batch") if _auto(given, name)]
    if not names:
        return None
    values = [f"{name} {_shown(getattr(decided.train, name))}" for name in names]
    return f"{given.name}: auto is planned as {', '.join(values)}. A run takes what it finds fastest."


def _auto(stage: Stage, name: str) -> bool:
    return getattr(stage.train, name) == "auto"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _with(stage: Stage, **changes: object) -> Stage:
    return stage.model_copy(update={"train": stage.train.model_copy(update=changes)})
