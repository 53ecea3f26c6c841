"""What a node of a syntax tree is changed into: operators, constants, names, arguments, dropped statements."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

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


def left_alone(node: ast.AST) -> bool:
    """Whether nothing below the node is changed."""
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


def changes(node: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    """The nodes to put in place of ``node``, one at a time."""
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
            if not (isinstance(node, ast.Expr) and left_alone(node.value)):
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
