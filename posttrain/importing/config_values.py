"""Finds what an expression of a Python configuration comes to, without running it."""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.config_terms import (
    BINARY,
    CALLS,
    COMPARE,
    FAULTS,
    MAX_LENGTH,
    MAX_NUMBER,
    UNARY,
    Module,
)

Scope = dict[str, Any]
"""Local names and their values."""


class Expressions(ABC):
    """The expressions of a file: constants, names, arithmetic, comparisons, and calls of known functions."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.module = Module()
        """Where names that are not local are looked up."""

    @abstractmethod
    def own_call(self, name: str, args: list[Any], named: dict[str, Any]) -> Any:
        """What a function of the file returns; NotImplemented if it has none of this name."""

    def value(self, node: ast.expr, scope: Scope) -> Any:
        """What ``node`` comes to. Raises PosttrainError if it is of a kind that is not read."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in scope:
                return scope[name]
            case ast.Name(id=name) if name in self.module.constants:
                return self.module.constants[name]
            case ast.Subscript(value=owner, slice=ast.Constant(value=key)):
                block = self.value(owner, scope)
                if isinstance(block, dict) and key in block:
                    return block[key]
                if isinstance(block, list | range) and isinstance(key, int):
                    return block[key]
            case ast.Attribute(value=owner, attr=name):
                block = self.value(owner, scope)
                if isinstance(block, dict) and name in block:
                    return block[name]
            case ast.BinOp(left=left, op=op, right=right):
                return self.apply(node, op, self.value(left, scope), self.value(right, scope))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
                return UNARY[type(op)](self.value(operand, scope))
            case ast.BoolOp(op=op, values=values):
                value: Any = None
                for part in values:
                    value = self.value(part, scope)
                    if bool(value) is isinstance(op, ast.Or):
                        break
                return value
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return COMPARE[type(op)](self.value(left, scope), self.value(right, scope))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test, scope) else orelse, scope)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return [self.value(element, scope) for element in elements]
            case ast.Dict(keys=keys, values=values) if all(keys):
                pairs = zip(keys, values, strict=True)
                return {self.value(k, scope): self.value(v, scope) for k, v in pairs if k}
            case ast.JoinedStr(values=values):
                return "".join(str(self.value(value, scope)) for value in values)
            case ast.FormattedValue(value=value, conversion=-1 | 115, format_spec=None):
                return self.value(value, scope)
            case ast.Call(func=function, args=args, keywords=keywords) if all(k.arg for k in keywords):
                named = {k.arg: self.value(k.value, scope) for k in keywords if k.arg}
                return self._called(node, ast.unparse(function), [self.value(a, scope) for a in args], named)
            case _:
                pass
        raise self.unread(node)

    def apply(self, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
        """The result of an operation. Raises PosttrainError if it has none, or a huge one."""
        try:
            result = BINARY[type(op)](left, right)
        except FAULTS:
            raise self.unread(node) from None
        number = isinstance(result, int | float) and abs(result) < MAX_NUMBER
        if isinstance(op, ast.Mult | ast.Pow) and not number:
            raise self.unread(node)
        if isinstance(result, str | list) and len(result) > MAX_LENGTH:
            raise self.unread(node)
        return result

    def unread(self, node: ast.AST) -> PosttrainError:
        """The error of a statement or expression that is not read."""
        line, text = getattr(node, "lineno", 1), ast.unparse(node).splitlines()[0]
        return PosttrainError(
            f"{self.file}:{line}: {text!r} is more than import-flags reads of a configuration: give the "
            "values that it makes after --, as the trainer's own overrides"
        )

    def _called(self, node: ast.Call, name: str, args: list[Any], named: dict[str, Any]) -> Any:
        if (result := self.own_call(name, args, named)) is not NotImplemented:
            return result
        if name not in CALLS:
            raise self.unread(node)
        try:
            return CALLS[name](*args, **named)
        except FAULTS as error:
            raise PosttrainError(f"{self.file}:{node.lineno}: {ast.unparse(node)}: {error}") from None
