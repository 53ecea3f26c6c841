"""What does a YAML file say, and on which line does it say it?

Plain data and positions, by YAML 1.2's core rules (3e-4 is a number, ``on`` is a word). Nothing is ever
constructed from a tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from posttrain.errors import RecipeError

MOST_BYTES = 1_000_000
MOST_NODES = 100_000
"""Bounds what aliases can expand to."""

Place = tuple[str | int, ...]


@dataclass
class Source:
    """The data of a file, and the line (from 1) of each of its keys and items."""

    name: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)
    quoted: set[Place] = field(default_factory=set)
    """Scalars that were written in quotes."""

    def line(self, place: Place) -> int:
        """The line of ``place``, or of the nearest block around it that the file has."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_file(path: Path) -> str:
    """The text of a recipe. Raises RecipeError where it is missing, too large, or no text."""
    try:
        if path.is_dir():
            raise RecipeError(f"{path} is a folder; a recipe is a YAML file")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise RecipeError(f"{path} has {size:,} bytes; a recipe has at most {MOST_BYTES:,}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text file in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error


def parse(text: str, name: str) -> Source:
    """Read one YAML document whose root is a mapping. Raises RecipeError with the line of what is wrong."""
    for number, line in enumerate(text.splitlines(), 1):
        if "\t" in line[: len(line) - len(line.lstrip())]:
            raise RecipeError(f"{name}:{number}: a tab indents this line; YAML indents with spaces")
    yaml = YAML(typ="safe", pure=True)
    try:
        documents = list(yaml.compose_all(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not documents or documents[0] is None:
        raise RecipeError(f"{name}: the file is empty; a recipe needs at least name, model and stages")
    if len(documents) > 1:
        line = documents[1].start_mark.line + 1
        raise RecipeError(f"{name}:{line}: a second document begins here; a recipe is one")
    root = documents[0]
    if not isinstance(root, MappingNode):
        found = "a list" if isinstance(root, SequenceNode) else f"the text {root.value[:40]!r}"
        raise RecipeError(f"{name}:{root.start_mark.line + 1}: a recipe is a mapping of fields, not {found}")
    reader = _Reader(name, yaml)
    source = Source(name, None, reader.lines, reader.quoted)
    source.data = reader.data(root, ())
    return source


class _Reader:
    def __init__(self, name: str, yaml: YAML) -> None:
        self.name, self.yaml, self.nodes = name, yaml, 0
        self.lines: dict[Place, int] = {}
        self.quoted: set[Place] = set()
        self.open: list[Node] = []

    def data(self, node: Node, place: Place) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise RecipeError(f"{self.name}: its aliases expand to more than {MOST_NODES:,} values")
        if any(node is outer for outer in self.open):
            raise self.error(node, "an alias contains itself")
        tag = str(node.tag)
        if not tag.startswith("tag:yaml.org,2002:") or ":python" in tag:
            raise self.error(node, f"the tag {tag!r} is not allowed: a recipe is plain data")
        self.lines.setdefault(place, node.start_mark.line + 1)
        self.open.append(node)
        try:
            if isinstance(node, MappingNode):
                return dict(self.pairs(node, place))
            if isinstance(node, SequenceNode):
                return [self.data(item, (*place, i)) for i, item in enumerate(node.value)]
            return self.scalar(node, place)
        finally:
            self.open.pop()

    def pairs(self, node: MappingNode, place: Place) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode) or str(key.tag) != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, ScalarNode) else "a list or mapping"
                raise self.error(key, f"the key {shown!r} is not a text")
            if key.value in seen:
                raise self.error(
                    key, f"the key {key.value!r} is given twice (first on line {seen[key.value]})"
                )
            seen[key.value] = line
            self.lines[(*place, key.value)] = line
            yield key.value, self.data(value, (*place, key.value))

    def scalar(self, node: Node, place: Place) -> Any:
        if getattr(node, "style", None) in ("'", '"'):
            self.quoted.add(place)
        kind = str(node.tag).rsplit(":", 1)[-1]
        if kind not in ("str", "int", "float", "bool", "null"):
            return node.value  # timestamps and the like are texts here
        try:
            return self.yaml.constructor.construct_object(node, deep=True)
        except (YAMLError, ValueError) as error:
            raise self.error(node, f"{node.value!r} is no {kind}") from error

    def error(self, node: Node, what: str) -> RecipeError:
        return RecipeError(f"{self.name}:{node.start_mark.line + 1}: {what}")
