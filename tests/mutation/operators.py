"""Every single change of a module's source that a sharp test should notice.

A mutant is one node of the syntax tree put in place of another. Text that people read (docstrings, messages,
f-strings, annotations, ``__repr__``), asserts and decorators are left alone.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType

from changes import changes, left_alone

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Mutant:
    """One change: ``new`` in place of ``owner.field`` or ``owner.field[index]``."""

    line: int
    function: str
    """Qualified name of the function or class that the change is in; "" at the top of the module."""
    key: tuple[str, int] | None
    """Qualified name and first line of the outermost function whose code changes; None where the change
    takes effect while the module is imported."""
    before: str
    after: str
    owner: ast.AST
    field: str
    index: int | None
    new: ast.AST

    @contextmanager
    def applied(self) -> Iterator[None]:
        old = _get(self.owner, self.field, self.index)
        _set(self.owner, self.field, self.index, self.new)
        try:
            yield
        finally:
            _set(self.owner, self.field, self.index, old)


class Module:
    """A module's syntax tree and its mutants."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, encoding="utf-8") as file:
            self.tree = ast.parse(file.read(), path)
        self.mutants: list[Mutant] = []
        self._names: list[str] = []
        self._key: tuple[str, int] | None = None
        self._statement: ast.stmt | None = None
        self._children(self.tree)

    def compiled(self, mutant: Mutant | None = None) -> CodeType:
        """The module's code with one change, or as it is."""
        if mutant is None:
            return compile(self.tree, self.path, "exec", dont_inherit=True)
        with mutant.applied():
            return compile(self.tree, self.path, "exec", dont_inherit=True)

    def _children(self, node: ast.AST) -> None:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.AST):
                    self._visit(child, node, field, index)

    def _visit(self, node: ast.AST, owner: ast.AST, field: str, index: int | None) -> None:
        if left_alone(node):
            return
        outside = self._names, self._key, self._statement
        if isinstance(node, ast.stmt):
            self._statement = node
        in_header = isinstance(owner, FUNCTIONS) and field != "body"
        for new in changes(node, at_import=self._key is None):
            self._add(node, owner, field, index, new)
        if isinstance(node, FUNCTIONS):
            self._names = [*self._names, node.name]
            self._children(node.args)
            if self._key is None:
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                self._key = ".".join(self._names), first
            for i, child in enumerate(node.body):
                self._visit(child, node, "body", i)
        elif isinstance(node, ast.ClassDef):
            self._names = [*self._names, node.name]
            self._children(node)
        elif not in_header:
            self._children(node)
        self._names, self._key, self._statement = outside

    def _add(self, node: ast.AST, owner: ast.AST, field: str, index: int | None, new: ast.AST) -> None:
        statement = self._statement
        assert statement is not None
        ast.fix_missing_locations(ast.copy_location(new, node))
        before, name = header(statement), ".".join(self._names)
        line = getattr(node, "lineno", statement.lineno)
        mutant = Mutant(line, name, self._key, before, "", owner, field, index, new)
        if node is statement:
            mutant.after = header(new)
        else:
            with mutant.applied():
                mutant.after = header(statement)
        if mutant.after != before:
            self.mutants.append(mutant)


def header(statement: ast.AST) -> str:
    """The statement's source on one line; of a compound one the part before its body."""
    shown = copy.copy(statement)
    for block in ("orelse", "finalbody", "handlers", "cases", "decorator_list"):
        if hasattr(shown, block):
            setattr(shown, block, [])
    if isinstance(getattr(shown, "body", None), list):
        shown.body = [ast.Pass()]
        return ast.unparse(shown).removesuffix("pass").strip()
    return ast.unparse(shown)


def _get(owner: ast.AST, field: str, index: int | None) -> ast.AST:
    value = getattr(owner, field)
    return value if index is None else value[index]


def _set(owner: ast.AST, field: str, index: int | None, new: ast.AST) -> None:
    if index is None:
        setattr(owner, field, new)
    else:
        getattr(owner, field)[index] = new
