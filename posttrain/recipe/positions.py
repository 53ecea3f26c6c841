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
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from posttrain.errors import RecipeError

MOST_BYTES = 1_000_000
MOST_NODES = 100_000
"""Bounds what aliases can expand to."""
MOST_LEVELS = 50
"""Bounds how deep blocks lie in each other: a tree is read by recursion."""

Place = tuple[str | int, ...]


@dataclass
class Source:
    """The data of a file, and the line (from 1) of each of its keys and items."""

    name: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)
    quoted: set[Place] = field(default_factory=set)
    """Scalars that were written in quotes."""
    empty: set[Place] = field(default_factory=set)
    """Places where nothing was written, not even ``null``."""

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
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)  # a pipe or device has no size and may have no end
        if len(content) > MOST_BYTES:
            raise RecipeError(f"{path} has more than {MOST_BYTES:,} bytes, the most that a recipe has")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text file in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a path that no file can have, such as one with a NUL
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"cannot read {str(path)!r}: {error}") from error


def parse(text: str, name: str) -> Source:
    """Read one YAML document whose root is a mapping. Raises RecipeError with the line of what is wrong."""
    for number, line in enumerate(text.split("\n"), 1):
        if "\t" in line[: len(line) - len(line.lstrip())]:
            raise RecipeError(f"{name}:{number}: a tab indents this line; YAML indents with spaces")
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # YAML lets a later anchor replace an earlier one
    try:
        _refuse_what_is_not_plain(yaml, text, name)
        documents = list(yaml.compose_all(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        what = error.problem or error.context or "it cannot be read"
        if "'\\t'" in what:
            what = "a tab stands where YAML wants a space"
        raise RecipeError(f"{where}: not valid YAML: {what}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{name}:{line}: not valid YAML: it has the character {text[error.position]!r}"
        ) from error
    except YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not documents or str(documents[0].tag) == "tag:yaml.org,2002:null":
        raise RecipeError(f"{name}: the file is empty; a recipe needs at least name, model and stages")
    if len(documents) > 1:
        line = documents[1].start_mark.line + 1
        raise RecipeError(f"{name}:{line}: a second document begins here; a recipe is one")
    root = documents[0]
    if not isinstance(root, MappingNode):
        found = "a list" if isinstance(root, SequenceNode) else f"the text {root.value[:40]!r}"
        raise RecipeError(f"{name}:{root.start_mark.line + 1}: a recipe is a mapping of fields, not {found}")
    reader = _Reader(name, yaml)
    source = Source(name, None, reader.lines, reader.quoted, reader.empty)
    source.data = reader.data(root, ())
    return source


def _refuse_what_is_not_plain(yaml: YAML, text: str, name: str) -> None:
    """Raise RecipeError for explicit tags, directives and deep nesting, seen before a tree is built."""
    level = 0
    for count, event in enumerate(yaml.parse(text)):
        what = f"more than {MOST_NODES:,} values, the most that a recipe has" if count > MOST_NODES else None
        if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            what = "a % directive is not allowed: a recipe is read by the rules of YAML 1.2"
        elif isinstance(event, CollectionStartEvent | ScalarEvent) and event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            what = f"the tag {tag!r} is not allowed: a recipe is plain data"
        level += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if level > MOST_LEVELS:
            what = f"blocks lie more than {MOST_LEVELS} deep in each other"
        if what is not None:
            raise RecipeError(f"{name}:{event.start_mark.line + 1}: {what}")


class _Reader:
    def __init__(self, name: str, yaml: YAML) -> None:
        self.name, self.yaml, self.nodes = name, yaml, 0
        self.lines: dict[Place, int] = {}
        self.quoted: set[Place] = set()
        self.empty: set[Place] = set()
        self.open: list[Node] = []

    def data(self, node: Node, place: Place) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            line = self.lines.get(place[:1], 1)  # of the field in use: the values lie where the anchors are
            raise RecipeError(f"{self.name}:{line}: its aliases expand to more than {MOST_NODES:,} values")
        if any(node is outer for outer in self.open):
            raise self.error(node, "an alias contains itself")
        self.lines.setdefault(place, node.start_mark.line + 1)
        self.open.append(node)
        try:
            if isinstance(node, MappingNode):
                return dict(self.pairs(node, place))
            if isinstance(node, SequenceNode):
                return [self.data(item, (*place, i)) for i, item in enumerate(node.value)]
            assert isinstance(node, ScalarNode), "the third and last kind of node"
            return self.scalar(node, place)
        finally:
            self.open.pop()

    def pairs(self, node: MappingNode, place: Place) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode) or str(key.tag) != "tag:yaml.org,2002:str":
                if not isinstance(key, ScalarNode):
                    raise self.error(key, "a list or mapping stands where a field's name is expected")
                if key.value == "<<":
                    raise self.error(key, "merging blocks with '<<' is not supported: write the fields out")
                raise self.error(key, f"the key {key.value[:40]!r} is not a text")
            _printable(key, self)
            if key.value in seen:
                raise self.error(
                    key, f"the key {key.value!r} is given twice (first on line {seen[key.value]})"
                )
            seen[key.value] = line
            self.lines[(*place, key.value)] = line
            yield key.value, self.data(value, (*place, key.value))

    def scalar(self, node: ScalarNode, place: Place) -> Any:
        if node.style in ("'", '"'):
            self.quoted.add(place)
        elif node.value == "":
            self.empty.add(place)
        _printable(node, self)
        kind = str(node.tag).rsplit(":", 1)[-1]
        if kind not in ("str", "int", "float", "bool", "null"):
            return node.value  # timestamps and the like are texts here
        try:
            return self.yaml.constructor.construct_object(node, deep=True)
        except (YAMLError, ValueError) as error:
            raise self.error(node, f"{node.value[:40]!r} is no {kind} that can be read") from error

    def error(self, node: Node, what: str) -> RecipeError:
        return RecipeError(f"{self.name}:{node.start_mark.line + 1}: {what}")


def _printable(node: ScalarNode, reader: _Reader) -> None:
    # "\\ud800" in quotes makes a text that can be neither printed nor written to a file
    if any("\ud800" <= c <= "\udfff" for c in node.value):
        raise reader.error(node, f"{node.value[:40]!r} has half of a surrogate pair, which is no character")
