"""Says what decides the result of a stage: which fields of a recipe, of the stages before it, and its own."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from posttrain.recipe.schema import BASE, Recipe, Stage
from posttrain.registry import Spec

DEFAULTS = 1
"""The version of the defaults, which fingerprints leave out. It is raised when a default changes."""


def deciding(recipe: Recipe, name: str) -> dict[str, Any]:
    """What decides the weights of ``name``, which is ``base`` or a stage of ``recipe``.

    It has the recipe's own fields, and under ``stages`` a block for each stage whose weights are loaded, by
    name: those before it, whole, and its own without fields marked LATE. If two recipes agree on it, and the
    fields marked LATE do too, the stage has the same weights but for rounding.
    """
    decides = recipe.deciding()
    if name == BASE:
        return {"model": decides["model"]}
    names = [*ancestors(recipe, name), name]
    loaded = [stage for stage in recipe.stages if stage.name in names]
    decides["stages"] = {s.name: _block(recipe, s, late=s.name != name) for s in loaded}
    if recipe.evaluation is not None and any(s.monitor is not None and s.monitor.rolls_back for s in loaded):
        decides["evaluation"] = recipe.evaluation.deciding()
    return decides


def fingerprint(recipe: Recipe, stage: str) -> str:
    """A hash of what decides the weights of ``stage``, without fields that have their default.

    So a new field changes no fingerprint, as long as it has its default.
    """
    decides, stages = deciding(recipe, stage), {s.name: s for s in recipe.stages}
    blocks = {name: _set(stages[name], block) for name, block in decides.pop("stages").items()}
    return _hash({"defaults": DEFAULTS, **_set(recipe, decides), "stages": blocks})


def former_fingerprint(recipe: Recipe, stage: str) -> str:
    """What :func:`fingerprint` was before it left out defaults: checkpoints of then are still read."""
    return _hash(deciding(recipe, stage))


def _hash(decides: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _set(spec: Spec, decides: dict[str, Any]) -> dict[str, Any]:
    """What :meth:`Spec.deciding` gave of ``spec``, without fields that have their default.

    What tells a block from others stays, and so does what was resolved, as the names of weights.
    """
    kept = {}
    for name, value in decides.items():
        own, field = getattr(spec, name, None), type(spec).model_fields.get(name)
        if field is None or name in ("type", "strategy", "start_from", "reference"):
            kept[name] = value
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if not field.is_required() and (own == default or value == _decided(default)):
            continue
        if isinstance(own, list) and all(isinstance(item, Spec) for item in own):
            kept[name] = [_set(item, block) for item, block in zip(own, value, strict=True)]
        elif isinstance(own, Spec) and type(own).deciding is Spec.deciding:
            kept[name] = _set(own, value)
        else:
            kept[name] = value
    return kept


def _decided(default: Any) -> Any:
    return default.deciding() if isinstance(default, Spec) else default


def ancestors(recipe: Recipe, name: str) -> list[str]:
    """The stages whose weights are loaded before stage ``name`` trains, those of references too, in order."""
    needed: set[str | None] = {name}
    for stage in reversed(recipe.stages):
        if stage.name in needed:
            needed |= {recipe.parent(stage), stage.reference}
    return [stage.name for stage in recipe.stages if stage.name in needed - {name}]


def _block(recipe: Recipe, stage: Stage, *, late: bool) -> dict[str, Any]:
    """The deciding fields of ``stage``, with the names of the weights that it starts from."""
    block = stage.deciding(late=late)
    block["start_from"] = recipe.parent(stage)
    if "reference" in stage.algorithm.roles:
        block["reference"] = stage.reference or recipe.parent(stage)
    if block["monitor"] == {}:
        block["monitor"] = None
    return block
