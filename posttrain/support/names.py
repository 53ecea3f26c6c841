"""Tells from a module's source which names it defines, without running it."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

DYNAMIC = ("globals", "exec", "setattr", "vars")
"""A module that calls one of these may define names that its source does not tell."""


def defined_names(spec: ModuleSpec) -> set[str] | None:
    """The names that the module of ``spec`` defines; None if its source does not tell them all.

    Raises SyntaxError if the source is no Python.
    """
    if (tree := _source(spec)) is None:
        return None
    names: set[str] = set()
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in DYNAMIC:
            return None
        if isinstance(node, ast.Global):
            names |= {*node.names}
    for node in _in_scope(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            return None
        names |= {*_bound(node)}
    return None if "__getattr__" in names else names


def class_home(spec: ModuleSpec, name: str) -> tuple[str, str] | None:
    """Module and name of what the module of ``spec`` has as ``name``, if it is a class or imported by name.

    A class of its own gives ``(spec.name, name)``. Raises SyntaxError if the source is no Python.
    """
    home = None
    for node in _in_scope(_source(spec) or ast.Module([], [])):
        if name not in _bound(node):
            continue
        home = (spec.name, name) if isinstance(node, ast.ClassDef) else None
        if isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
            home = (module, next(a.name for a in node.names if (a.asname or a.name) == name))
    return home


def _source(spec: ModuleSpec) -> ast.Module | None:
    """The module's source; None if it has none."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        return ast.parse(Path(spec.origin).read_bytes(), spec.origin)
    except OSError:
        return None


def _in_scope(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below ``node``, without those inside functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _in_scope(child)


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that a node binds by itself."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name
