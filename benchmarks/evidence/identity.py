"""Says by what a record was made, so that records that do not compare are never mixed."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.evidence.arms import MODEL
from posttrain import Recipe
from posttrain.errors import PosttrainError
from posttrain.support.records import read_object

JUDGE = (
    *("posttrain/shapes/detect.py", "posttrain/shapes/outlines.py", "posttrain/shapes/scene.py"),
    *("rewards/_geneval_scores.py", "rewards/shapes.py"),
)
"""The source that scores are computed by."""
ROOT = Path(__file__).parent.parent.parent


def identity(recipes: Iterable[Recipe], measures: dict[str, Any]) -> dict[str, Any]:
    """By what a record is made: the fields of the ``recipes`` of its training, its ``measures``, the base
    model's files and the judge's source. A recipe's ``seed`` is left out, so all seeds of an arm have one
    identity."""
    blocks = [recipe.model_dump(mode="json", exclude={"seed"}) for recipe in recipes]
    return {
        "recipes": dict(_fields(blocks)),
        "measures": _print(measures),
        "base": _print(_base()),
        "judge": _print([_source(ROOT / name) for name in JUDGE]),
    }


def is_made(record: Path, by: dict[str, Any]) -> bool:
    """Whether ``record`` is there. Raises PosttrainError if it was made by something else."""
    if not record.exists():
        return False
    if other := differing(read_object(record, "identity")["identity"], by):
        raise PosttrainError(
            f"{record}: made by other {', '.join(other)}. Remove it, or give another --records and --runs"
        )
    return True


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The entries by which two identities differ.

    A field that only one's recipes have says nothing: posttrain had no such field when the other was made.
    """
    entries = {key for key in {*one, *other} - {"recipes"} if one.get(key) != other.get(key)}
    fields, theirs = one.get("recipes", {}), other.get("recipes", {})
    if any(fields[name] != theirs[name] for name in {*fields} & {*theirs}):
        entries.add("recipes")
    return sorted(entries)


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values within ``value``, each with its path. An empty list or object is a value."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _fields(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _base() -> dict[str, str]:
    from posttrain.weights.pipeline_folder import ASSETS

    made = read_object(ASSETS / MODEL["path"].rpartition("/")[2] / "provenance.json", "sha256")
    return made["sha256"]


def _source(file: Path) -> str:
    """The code of ``file`` without comments and layout."""
    return ast.dump(ast.parse(file.read_text("utf-8")))


def _print(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
