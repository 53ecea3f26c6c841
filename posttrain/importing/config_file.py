"""Reads a configuration of ml_collections, such as ``config/grpo.py:geneval_sd3``, without running it.

The few kinds of statements that such files hold are interpreted here: assignments, arithmetic, conditions,
loops, and calls of the file's own functions. Nothing is imported and no code of the file is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.importing.config_terms import FAULTS, GPUS, Lenient, Module, as_load, dotted, flat, module
from posttrain.importing.config_values import Expressions, Scope
from posttrain.support.spelling import meant

MAX_STEPS = 100_000


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        self.value = value


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


class ConfigFile(Expressions):
    """A configuration file, and the ``base.py`` beside it."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        own, base = module(file), file.with_name("base.py")
        self.functions = own.functions
        self.base = module(base) if base.is_file() and base != file else Module()
        self.set: set[str] = set()
        """Dotted names that the file itself sets, not its base."""
        self.gpus: int | None = None
        self._in_base = 0
        self._steps = 0
        self.module = self.base
        self._constants()
        self.module = own
        self._constants()

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
        function = self.functions[name]
        try:
            config = self._call(function, [], {})
        except FAULTS as error:
            raise self._fault(function, error) from None
        if not isinstance(config, dict):
            raise PosttrainError(f"{self.file}: {name} returns no configuration")
        return dict(flat(config, ""))

    def _constants(self) -> None:
        """Read the module's constants; one that cannot be read is not known."""
        values = self.module.constants
        for name, node in self.module.nodes:
            values.pop(name, None)
            try:
                if node is not None:
                    values[name] = self.value(node, {})
                    self._notice(name, values[name])
            except (PosttrainError, *FAULTS):
                continue

    def _call(self, function: ast.FunctionDef, positional: list[Any], named: dict[str, Any]) -> Any:
        parts = function.args
        arguments, only = [a.arg for a in parts.args], [a.arg for a in parts.kwonlyargs]
        strange = parts.vararg or parts.kwarg or parts.posonlyargs or function.decorator_list
        if strange or len(positional) > len(arguments) or not {*named} <= {*arguments, *only}:
            raise self.unread(function)
        count = len(arguments) - len(parts.defaults)
        scope = {n: self.value(d, {}) for n, d in zip(arguments[count:], parts.defaults, strict=True)}
        scope |= {n: self.value(d, {}) for n, d in zip(only, parts.kw_defaults, strict=True) if d}
        scope |= dict(zip(arguments, positional, strict=False)) | named
        for argument, value in scope.items():
            self._notice(argument, value)
        try:
            self._run(function.body, scope)
        except _Return as result:
            return result.value
        except (_Break, _Continue):
            raise self.unread(function) from None
        return None

    def _run(self, body: list[ast.stmt], scope: Scope) -> None:
        for statement in body:
            self._step(statement)
            try:
                self._statement(statement, scope)
            except FAULTS as error:
                raise self._fault(statement, error) from None

    def _step(self, node: ast.stmt) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise PosttrainError(f"{self.file}:{node.lineno}: does not come to an end")

    def _fault(self, node: ast.stmt, error: BaseException) -> PosttrainError:
        words = "too deep to be read" if isinstance(error, RecursionError | MemoryError) else str(error)
        return PosttrainError(f"{self.file}:{node.lineno}: {words}")

    def _statement(self, node: ast.stmt, scope: Scope) -> None:
        match node:
            case ast.Assign():
                value = self.value(node.value, scope)
                for target in node.targets:
                    self._assign(target, value, scope)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, self.value(value, scope), scope)
            case ast.AugAssign(target=target, op=op, value=value):
                before = self.value(as_load(target), scope)
                self._assign(target, self.apply(node, op, before, self.value(value, scope)), scope)
            case ast.If(test=test, body=body, orelse=orelse):
                self._run(body if self.value(test, scope) else orelse, scope)
            case ast.While(test=test, orelse=[]):
                self._loop(node, (None for _ in iter(lambda: bool(self.value(test, scope)), False)), scope)
            case ast.For(iter=items, orelse=[]):
                values = self.value(items, scope)
                if not isinstance(values, list | range):
                    raise self.unread(node)
                self._loop(node, iter(values), scope)
            case ast.Return(value=value):
                raise _Return(None if value is None else self.value(value, scope))
            case ast.Break():
                raise _Break
            case ast.Continue():
                raise _Continue
            case ast.Assert() | ast.Pass() | ast.Import() | ast.ImportFrom():
                return
            case ast.Expr(value=ast.Constant()):
                return
            case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
                return
            case _:
                raise self.unread(node)

    def _loop(self, node: ast.While | ast.For, values: Iterator[Any], scope: Scope) -> None:
        for value in values:
            self._step(node)
            if isinstance(node, ast.For):
                self._assign(node.target, value, scope)
            try:
                self._run(node.body, scope)
            except _Continue:
                continue
            except _Break:
                return

    def _assign(self, target: ast.expr, value: Any, scope: Scope) -> None:
        match target:
            case ast.Name(id=name):
                scope[name] = value
                self._notice(name, value)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                if not isinstance(value, list) or len(value) != len(parts):
                    raise self.unread(target)
                for part, one in zip(parts, value, strict=True):
                    self._assign(part, one, scope)
            case (
                ast.Attribute(value=owner, attr=name)
                | ast.Subscript(value=owner, slice=ast.Constant(value=str(name)))
            ):
                block = self.value(owner, scope)
                if not isinstance(block, dict):
                    raise self.unread(target)
                block[name] = value
                if not self._in_base:
                    self.set.add(dotted(target).partition(".")[2])
            case _:
                raise self.unread(target)

    def _notice(self, name: str, value: Any) -> None:
        if name in GPUS and isinstance(value, int) and value > 0:
            self.gpus = value

    def own_call(self, name: str, args: list[Any], named: dict[str, Any]) -> Any:
        """What a function of the file or its base returns; NotImplemented if it has none of this name."""
        if name in self.module.functions:
            return self._call(self.module.functions[name], args, named)
        if name.startswith("base.") and name[5:] in self.base.functions:
            before, self.module = self.module, self.base
            self._in_base += 1
            try:
                return self._call(self.base.functions[name[5:]], args, named)
            finally:
                self._in_base -= 1
                self.module = before
        # without a base.py the published defaults stand in
        return Lenient() if name == "base.get_config" else NotImplemented
