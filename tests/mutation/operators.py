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

COMPARISONS = {
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_PAIRS = "min max,minimum maximum,amin amax,argmin argmax,any all,ones zeros,ones_like zeros_like,sin cos,"
_PAIRS += "floor ceil,startswith endswith"
NAMES = dict(pair.split() for pair in _PAIRS.split(","))
NAMES |= {b: a for a, b in NAMES.items()}
METHODS = NAMES | {"sum": "mean", "mean": "sum"}
DROPPED_METHODS = {"clamp", "abs", "sqrt", "square", "exp", "log", "sign", "sigmoid", "detach", "tanh"}
TALK = {"print", "log", "debug", "info", "warning", "warn", "error", "TypeVar", "ParamSpec"}
"""Calls of words for people, or of types."""
WORDS = {"description", "help", "title"}
"""Keyword arguments that are words for people."""
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
        if _left_alone(node):
            return
        outside = self._names, self._key, self._statement
        if isinstance(node, ast.stmt):
            self._statement = node
        in_header = isinstance(owner, FUNCTIONS) and field != "body"
        for new in _changes(node, at_import=self._key is None):
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


def _left_alone(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return True
        case ast.FunctionDef(name="__repr__") | ast.keyword(arg=("description" | "help" | "title")):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Subscript(value=ast.Name(id="Literal")):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            # a method such as tensor.log() has no arguments to read
            return name in TALK and bool(node.args or node.keywords)
    return False


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _changes(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    if isinstance(node, ast.stmt):
        yield from _statements(node)
        return
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for new in COMPARISONS[type(op)]:
                    yield _with(node, ops=[*ops[:i], new(), *ops[i + 1 :]])
        case ast.BinOp(left=left, op=op, right=right):
            is_type = at_import and isinstance(op, ast.BitOr)
            if type(op) in ARITHMETIC and not (is_type or _is_text(left) or _is_text(right)):
                yield _with(node, op=ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield copy.copy(operand)
        case ast.Constant(value=value):
            yield from (ast.Constant(v) for v in _constants(value))
        case ast.IfExp():
            yield from (_with(node, test=ast.Constant(v)) for v in (True, False))
        case ast.comprehension(ifs=ifs):
            for i in range(len(ifs)):
                for v in (True, False):
                    yield _with(node, ifs=[*ifs[:i], ast.Constant(v), *ifs[i + 1 :]])
        case ast.Slice():
            for side in ("lower", "upper"):
                bound = getattr(node, side)
                if bound is not None and not isinstance(bound, ast.Constant):
                    yield _with(node, **{side: ast.BinOp(bound, ast.Add(), ast.Constant(1))})
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield _with(node, id=NAMES[name])
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in METHODS:
            yield _with(node, attr=METHODS[name])
        case ast.Call():
            yield from _calls(node)


def _constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [2, 0] if value == 1 else [value + 1]
    if isinstance(value, float):
        return [round(value * 1.1, 12) if value else 1.0]
    return []


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is None or keyword.arg in WORDS:
            continue
        others = [*node.keywords[:i], *node.keywords[i + 1 :]]
        yield _with(node, keywords=others)
        if keyword.arg in ("min", "max") and NAMES[keyword.arg] not in [k.arg for k in others]:
            yield _with(node, keywords=[*others, ast.keyword(NAMES[keyword.arg], keyword.value)])
    for i, (a, b) in enumerate(zip(node.args, node.args[1:], strict=False)):
        if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred):
            yield _with(node, args=[*node.args[:i], b, a, *node.args[i + 2 :]])
    if isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED_METHODS:
        yield copy.copy(node.func.value)


def _statements(node: ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.If() | ast.While():
            yield from (_with(node, test=ast.Constant(v)) for v in (True, False))
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.Raise() | ast.Continue() | ast.Break():
            if not (isinstance(node, ast.Expr) and _left_alone(node.value)):
                yield ast.Pass()
        case ast.AugAssign(op=op, target=target):
            yield ast.Pass()
            if type(op) in ARITHMETIC and not isinstance(op, ast.BitOr | ast.BitAnd):
                yield ast.AugAssign(target, ARITHMETIC[type(op)](), node.value)
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield ast.Pass()
        case ast.With(items=items) if all(item.optional_vars is None for item in items):
            yield ast.If(ast.Constant(True), node.body, [])


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)
