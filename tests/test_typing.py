"""A recipe that is written in Python has no false type errors: what the fields need for that."""

import ast
import re
from pathlib import Path

from posttrain.recipe.schema import Recipe
from posttrain.recipe.variants import NAME
from posttrain.registry import Spec

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for folder in ("posttrain", "algorithms", "rewards") for p in (ROOT / folder).rglob("*.py")
)


def test_defaults_are_given_by_keyword():
    """Type checkers take a field for one without a default if Field has it as its first argument."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Field" and node.args
    ]
    assert not found


def every_spec(cls=Spec):
    for sub in cls.__subclasses__():
        yield sub
        yield from every_spec(sub)


def test_paths_take_strings():
    """``Path`` and ``Path | None`` refuse a string, which the schema takes: AnyPath and MaybePath do not."""
    annotations = [
        f"{spec.__name__}.{name}"
        for spec in every_spec()
        if spec.__module__.startswith("posttrain.")
        for name, text in spec.__annotations__.items()
        if not str(text).startswith("ClassVar")  # a class's own value is in no recipe
        if re.search(r"\bPath\b", str(text)) or "AnyPath |" in str(text)
    ]
    assert Recipe in every_spec()
    assert not annotations


def test_a_text_of_a_certain_form_has_an_example_for_messages():
    patterns = [
        (spec, name, pattern)
        for spec in every_spec()
        for name, field in spec.model_fields.items()
        for mark in field.metadata
        if (pattern := getattr(mark, "pattern", None)) is not None
        and pattern != f"^{NAME}$"  # which has words of its own
    ]
    assert len(patterns) >= 5
    for spec, name, pattern in patterns:
        (example,) = spec.model_fields[name].examples or [""]
        assert re.search(pattern, example), f"{spec.__name__}.{name}"
