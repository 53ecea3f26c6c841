"""Reads a configuration of ml_collections, such as ``config/grpo.py:geneval_sd3``, without running it.

The few kinds of statements that such files hold are interpreted here: assignments, arithmetic, conditions,
loops, and calls of the file's own functions. Nothing is imported and no code of the file is executed.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.config_terms import (
    BINARY,
    CALLS,
    COMPARE,
    GPUS,
    MAX_NUMBER,
    Lenient,
    as_load,
    flat,
    functions,
)
from posttrain.support.spelling import meant

MAX_STEPS = 100_000


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Break(Exception):
    pass


class ConfigFile:
    """A configuration file, and the ``base.py`` beside it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.functions = functions(file)
        base = file.with_name("base.py")
        self.base = functions(base) if base.is_file() and base != file else {}
        self.set: set[str] = set()
        """Dotted names that the file itself sets, not its base."""
        self.gpus: int | None = None
        self._in_base = 0
        self._steps = 0

    def names(self) -> list[str]:
        """The functions that may be configurations."""
        return [n for n in self.functions if n != "get_config" and not n.startswith("_")]

    def values(self, name: str) -> dict[str, Any]:
        """Dotted name -> value of the configuration ``name``. Raises PosttrainError if it cannot be read."""
        if name not in self.names():
            known = ", ".join(self.names())
            raise PosttrainError(
                f"{self.file} has no configuration {name!r}{meant(name, self.names())}: {known}"
            )
        config = self._call(self.functions[name], [], {})
        if not isinstance(config, dict):
            raise PosttrainError(f"{self.file}: {name} returns no configuration")
        return dict(flat(config, ""))

    def _call(self, function: ast.FunctionDef, positional: list[Any], named: dict[str, Any]) -> Any:
        arguments = [a.arg for a in function.args.args]
        defaults = function.args.defaults
        scope = dict(
            zip(arguments[len(arguments) - len(defaults) :], map(self._constant, defaults), strict=True)
        )
        scope |= dict(zip(arguments, positional, strict=False)) | named
        for argument, value in scope.items():
            self._notice(argument, value)
        try:
            self._run(function.body, scope)
        except _Return as result:
            return result.value
        return None

    def _constant(self, node: ast.expr) -> Any:
        return self._value(node, {})

    def _run(self, body: list[ast.stmt], scope: dict[str, Any]) -> None:
        for statement in body:
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise PosttrainError(f"{self.file}:{statement.lineno}: does not come to an end")
            self._statement(statement, scope)

    def _statement(self, node: ast.stmt, scope: dict[str, Any]) -> None:
        match node:
            case ast.Assign():
                value = self._value(node.value, scope)
                for target in node.targets:
                    self._assign(target, value, scope)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self._value(value, scope), scope)
            case ast.AugAssign(target=target, op=op, value=value):
                before = self._value(as_load(target), scope)
                self._assign(target, self._apply(node, op, before, self._value(value, scope)), scope)
            case ast.If(test=test, body=body, orelse=orelse):
                self._run(body if self._value(test, scope) else orelse, scope)
            case ast.While(test=test, body=body):
                try:
                    while self._value(test, scope):
                        self._run(body, scope)
                except _Break:
                    return
            case ast.Return(value=value):
                raise _Return(None if value is None else self._value(value, scope))
            case ast.Break():
                raise _Break
            case ast.Assert() | ast.Pass() | ast.Import() | ast.ImportFrom():
                return
            case ast.Expr(value=ast.Constant()):
                return
            case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
                return
            case _:
                raise self._unread(node)

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        match target:
            case ast.Name(id=name):
                scope[name] = value
                self._notice(name, value)
            case ast.Attribute(value=owner, attr=name):
                block = self._value(owner, scope)
                if not isinstance(block, dict):
                    raise self._unread(target)
                block[name] = value
                if not self._in_base:
                    self.set.add(ast.unparse(target).partition(".")[2])
            case _:
                raise self._unread(target)

    def _notice(self, name: str, value: Any) -> None:
        if name in GPUS and isinstance(value, int) and value > 0:
            self.gpus = value

    def _value(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in scope:
                return scope[name]
            case ast.Attribute(value=owner, attr=name):
                block = self._value(owner, scope)
                if isinstance(block, dict) and name in block:
                    return block[name]
            case ast.BinOp(left=left, op=op, right=right):
                return self._apply(node, op, self._value(left, scope), self._value(right, scope))
            case ast.UnaryOp(op=op, operand=operand):
                value = self._value(operand, scope)
                return not value if isinstance(op, ast.Not) else -value if isinstance(op, ast.USub) else value
            case ast.BoolOp(op=op, values=values):
                found = [self._value(value, scope) for value in values]
                return all(found) if isinstance(op, ast.And) else any(found)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return COMPARE[type(op)](self._value(left, scope), self._value(right, scope))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._value(body if self._value(test, scope) else orelse, scope)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return [self._value(element, scope) for element in elements]
            case ast.Dict(keys=keys, values=values) if all(keys):
                return {
                    self._value(k, scope): self._value(v, scope)
                    for k, v in zip(keys, values, strict=True)
                    if k
                }
            case ast.JoinedStr(values=values):
                return "".join(str(self._value(value, scope)) for value in values)
            case ast.FormattedValue(value=value):
                return self._value(value, scope)
            case ast.Call(func=function, args=args, keywords=keywords):
                named = {k.arg: self._value(k.value, scope) for k in keywords if k.arg}
                return self._called(node, ast.unparse(function), [self._value(a, scope) for a in args], named)
            case _:
                pass
        raise self._unread(node)

    def _called(self, node: ast.Call, name: str, args: list[Any], named: dict[str, Any]) -> Any:
        if name in self.functions:
            return self._call(self.functions[name], args, named)
        if name.startswith("base.") and name[5:] in self.base:
            self._in_base += 1
            try:
                return self._call(self.base[name[5:]], args, named)
            finally:
                self._in_base -= 1
        if name == "base.get_config":  # there is no base.py: the published defaults stand in
            return Lenient()
        if name not in CALLS:
            raise self._unread(node)
        try:
            return CALLS[name](*args, **named)
        except (TypeError, ValueError) as error:
            raise PosttrainError(f"{self.file}:{node.lineno}: {ast.unparse(node)}: {error}") from None

    def _apply(self, node: ast.AST, op: ast.operator, left: Any, right: Any) -> Any:
        try:
            result = BINARY[type(op)](left, right)
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
            raise self._unread(node) from None
        if isinstance(op, ast.Mult) and not (isinstance(result, int | float) and abs(result) < MAX_NUMBER):
            raise self._unread(node)
        return result

    def _unread(self, node: ast.AST) -> PosttrainError:
        line, text = getattr(node, "lineno", 1), ast.unparse(node).splitlines()[0]
        return PosttrainError(
            f"{self.file}:{line}: {text!r} is more than import-flags reads of a configuration: "
            f"give the values "
            "that it makes after --, as the trainer's own overrides"
        )
