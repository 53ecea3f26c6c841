"""What :mod:`posttrain.importing.config_file` knows of Python: operators, calls, and a file's functions."""

from __future__ import annotations

import ast
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError

MAX_BYTES = 1_000_000
MAX_NUMBER = 10**30
BLOCKS = ("pretrained", "sample", "train")
GPUS = ("gpu_number", "n_gpus", "num_gpus")
"""Names under which such files hold the number of GPUs."""
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
CALLS: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (int, float, str, bool, len, min, max, round, abs, dict, list, tuple)},
    "os.getcwd": lambda: "",
    "os.path.join": lambda *parts: (
        os.path.join(*parts).lstrip("/") if parts and not parts[0] else os.path.join(*parts)
    ),
    "ml_collections.ConfigDict": dict,
}


class Lenient(dict[str, Any]):
    """A configuration whose blocks are made when they are first named."""

    def __contains__(self, name: object) -> bool:
        return name in BLOCKS or super().__contains__(name)

    def __missing__(self, name: str) -> Any:
        self[name] = {}
        return self[name]


def functions(file: Path) -> dict[str, ast.FunctionDef]:
    """The functions of a file. Raises PosttrainError if it is not Python."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise PosttrainError(f"{file} has more than {MAX_BYTES:,} bytes")
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError) as error:
        raise PosttrainError(f"{file} is not valid Python: {error}") from None
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def flat(block: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """The dotted names of a configuration. Blocks are ``pretrained``, ``sample``, ``train``; other mappings,
    such as the rewards, are values."""
    pairs: list[tuple[str, Any]] = []
    for key, value in block.items():
        if isinstance(value, dict) and not prefix and key in BLOCKS:
            pairs += flat(value, f"{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs


def as_load(target: ast.expr) -> ast.expr:
    """The target of an assignment as an expression to be read."""
    return ast.parse(ast.unparse(target), mode="eval").body
