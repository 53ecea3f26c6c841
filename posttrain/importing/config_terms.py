"""What is read of Python in a configuration: operators, calls, and a file's functions."""

from __future__ import annotations

import ast
import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
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
    ast.Mod: lambda a, b: _remainder(a, b),
    ast.Pow: lambda a, b: _power(a, b),
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
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
MAX_LENGTH = 100_000
"""Items of a range, a list or a text, at most."""


def _power(base: Any, exponent: Any) -> Any:
    """A power of numbers. Raises ValueError if it may be huge."""
    if not isinstance(exponent, int | float) or abs(exponent) > 100:
        raise ValueError("an exponent of more than 100")
    return base**exponent


def _remainder(left: Any, right: Any) -> Any:
    """A remainder, or a text that is filled in. Raises ValueError if the text has wide fields."""
    if isinstance(left, str) and re.search(r"%[^%a-zA-Z]*(\d{3}|\*)", left):
        raise ValueError("a wide field")
    return left % right


def _range(*edges: int) -> range:
    """The range, if it is short. Raises ValueError."""
    numbers = range(*edges)
    if len(numbers) > MAX_LENGTH:
        raise ValueError(f"more than {MAX_LENGTH:,} numbers")
    return numbers


CALLS: dict[str, Callable[..., Any]] = {
    "range": _range,
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


FAULTS = (
    TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError, AttributeError,
)  # fmt: skip
"""What a statement that Python would run, or refuse, can end in."""


@dataclass
class Module:
    """The functions of a file, and the constants that stand beside them."""

    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    nodes: list[tuple[str, ast.expr | None]] = field(default_factory=list)
    """Names of the module in the order of their assignments; None is a value that is not read."""
    constants: dict[str, Any] = field(default_factory=dict)


def module(file: Path) -> Module:
    """The functions and constants of a file. Raises PosttrainError if it is not Python."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise PosttrainError(f"{file} has more than {MAX_BYTES:,} bytes")
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PosttrainError(f"{file} is not valid Python: {error}") from None
    except OSError as error:
        raise PosttrainError(f"{file} cannot be read: {error.strerror}") from None
    found = Module()
    for node in tree.body:
        match node:
            case ast.FunctionDef():
                found.functions[node.name] = node
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found.nodes.append((name, value))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                found.nodes.append((name, value))
            case _:
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
                found.nodes += [(n.id, None) for n in stored if isinstance(n.ctx, ast.Store)]
    return found


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


def dotted(target: ast.expr) -> str:
    """The names of a target: ``config.train.seed`` for ``config.train['seed']`` too."""
    match target:
        case (
            ast.Attribute(value=owner, attr=name) | ast.Subscript(value=owner, slice=ast.Constant(value=name))
        ):
            return f"{dotted(owner)}.{name}"
        case _:
            return ast.unparse(target)
