"""Reads a YAML file as plain data together with the line of each key and list item.

YAML 1.2's core rules apply: 3e-4 is a number, ``on`` is a text. No tag ever constructs an object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    ScalarEvent,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.parser import Parser
from ruamel.yaml.reader import ReaderError

from posttrain.errors import RecipeError
from posttrain.registry import FieldPath

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
"""Bounds what aliases can expand to."""
MAX_DEPTH = 50
"""Bounds the nesting of blocks, because the reader is recursive."""
MAX_INT = 2**63 - 1
SHOWN_CHARACTERS = 40
"""How much of a text an error message quotes."""


@dataclass
class Source:
    """The data of a file, with the line number (from 1) of each key and list item.

    Data that no file holds, such as the options of a command, have no lines.
    """

    name: str
    """The file's name in error messages."""
    data: Any
    lines: dict[FieldPath, int] = field(default_factory=dict)
    quoted: set[FieldPath] = field(default_factory=set)
    """Fields whose value was written in quotes."""
    empty: set[FieldPath] = field(default_factory=set)
    """Fields without a value, not even ``null``."""

    def place(self, path: FieldPath) -> str:
        """The place of the field for an error message: ``name:line``, or ``name`` if there are no lines."""
        return f"{self.name}:{self.line(path)}" if self.lines else self.name

    def line(self, path: FieldPath) -> int:
        """The line of the field at ``path``, or of the innermost block around it that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_file(file: Path) -> str:
    """The text of a recipe file. Raises RecipeError if it is missing, too large, or not UTF-8 text."""
    try:
        if file.is_dir():
            raise RecipeError(f"{file} is a folder; a recipe is a YAML file")
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(f"{file} has {size:,} bytes; a recipe has at most {MAX_BYTES:,}")
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)  # a pipe or device has no size and may have no end
        if len(content) > MAX_BYTES:
            raise RecipeError(f"{file} has more than {MAX_BYTES:,} bytes; a recipe has at most that many")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not a text file in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise RecipeError(f"cannot read {file}: {error.strerror}") from error
    except RecipeError:
        raise
    except ValueError as error:  # no file can have such a path, for example one with a NUL
        raise RecipeError(f"cannot read {str(file)!r}: {error}") from error


def parse(text: str, name: str) -> Source:
    """Read one YAML document whose root is a mapping; ``name`` is the file's name in error messages.

    Raises RecipeError with the line if the text is not valid YAML, not plain data, or not one mapping.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if "\t" in line[: len(line) - len(line.lstrip())]:
            raise RecipeError(f"{name}:{number}: a tab indents this line; YAML indents with spaces")
    yaml = YAML(typ="safe", pure=True)
    yaml.Parser = partial(_PlainParser, name)
    yaml.composer.warn_double_anchors = False  # YAML lets a later anchor replace an earlier one
    root = _only_mapping(_composed(yaml, text, name), name)
    reader = _Reader(name, yaml)
    source = Source(name, None, reader.lines, reader.quoted, reader.empty)
    source.data = reader.data(root, ())
    return source


def _composed(yaml: YAML, text: str, name: str) -> list[Node]:
    """The root node of each document in ``text``."""
    try:
        return list(yaml.compose_all(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        what = error.problem or error.context or "it cannot be read"
        if "'\\t'" in what:
            what = "a tab stands where YAML wants a space"
        raise RecipeError(f"{where}: not valid YAML: {what}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = text[error.position]
        raise RecipeError(f"{name}:{line}: not valid YAML: it has the character {character!r}") from error
    except YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error


class _PlainParser(Parser):
    """A parser that refuses tags, directives, deep nesting and too many values before a node is made of them.

    Raises RecipeError.
    """

    def __init__(self, name: str, loader: YAML) -> None:
        super().__init__(loader)
        self.name, self.count, self.depth = name, 0, 0

    def get_event(self) -> Event:
        event = super().get_event()
        problem = None
        if self.count > MAX_NODES:
            problem = f"more than {MAX_NODES:,} values, the most that a recipe may have"
        if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            problem = "a % directive is not allowed: a recipe is read by the rules of YAML 1.2"
        elif isinstance(event, CollectionStartEvent | ScalarEvent) and event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"the tag {tag!r} is not allowed: a recipe is plain data"
        self.count += 1
        self.depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if self.depth > MAX_DEPTH:
            problem = f"blocks are nested more than {MAX_DEPTH} deep in each other"
        if problem is not None:
            raise RecipeError(f"{self.name}:{event.start_mark.line + 1}: {problem}")
        return event


def _only_mapping(documents: list[Node], name: str) -> MappingNode:
    """The root of the only document. Raises RecipeError unless there is one, and it is a mapping."""
    if not documents or str(documents[0].tag) == "tag:yaml.org,2002:null":
        raise RecipeError(f"{name}: the file is empty; a recipe needs at least name, model and stages")
    if len(documents) > 1:
        line = documents[1].start_mark.line + 1
        raise RecipeError(f"{name}:{line}: a second document begins here; a recipe is one document")
    root = documents[0]
    if not isinstance(root, MappingNode):
        kind = "a list" if isinstance(root, SequenceNode) else f"the text {root.value[:SHOWN_CHARACTERS]!r}"
        raise RecipeError(f"{name}:{root.start_mark.line + 1}: a recipe is a mapping of fields, not {kind}")
    return root


class _Reader:
    """Turns YAML nodes into plain data and notes where each value was."""

    def __init__(self, name: str, yaml: YAML) -> None:
        self.name, self.yaml, self.count = name, yaml, 0
        self.lines: dict[FieldPath, int] = {}
        self.quoted: set[FieldPath] = set()
        self.empty: set[FieldPath] = set()
        self.open: list[Node] = []
        """The nodes around the current one, outermost first."""

    def data(self, node: Node, path: FieldPath) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            line = self.lines.get(path[:1], 1)  # of the top-level field: the node itself is at its anchor
            raise RecipeError(f"{self.name}:{line}: its aliases expand to more than {MAX_NODES:,} values")
        if any(node is outer for outer in self.open):
            raise self.error(node, "an alias contains itself")
        self.lines.setdefault(path, node.start_mark.line + 1)
        self.open.append(node)
        try:
            if isinstance(node, MappingNode):
                return dict(self.pairs(node, path))
            if isinstance(node, SequenceNode):
                return [self.data(item, (*path, i)) for i, item in enumerate(node.value)]
            assert isinstance(node, ScalarNode), "YAML has three kinds of nodes"
            return self.scalar(node, path)
        finally:
            self.open.pop()

    def pairs(self, node: MappingNode, path: FieldPath) -> Iterator[tuple[str, Any]]:
        first_lines: dict[str, int] = {}
        for key_node, value in node.value:
            key = self.key(key_node)
            if key in first_lines:
                message = f"the key {key!r} is given twice (first on line {first_lines[key]})"
                raise self.error(key_node, message)
            first_lines[key] = self.lines[(*path, key)] = key_node.start_mark.line + 1
            yield key, self.data(value, (*path, key))

    def key(self, node: Node) -> str:
        if not isinstance(node, ScalarNode):
            raise self.error(node, "a list or mapping stands where a field's name is expected")
        if str(node.tag) != "tag:yaml.org,2002:str":
            if node.value == "<<":
                raise self.error(node, "merging blocks with '<<' is not supported: write the fields out")
            raise self.error(node, f"the key {node.value[:SHOWN_CHARACTERS]!r} is not a text")
        self.check_characters(node)
        return node.value

    def scalar(self, node: ScalarNode, path: FieldPath) -> Any:
        if node.style in ("'", '"'):
            self.quoted.add(path)
        elif node.value == "":
            self.empty.add(path)
        self.check_characters(node)
        kind = str(node.tag).rsplit(":", 1)[-1]
        if kind not in ("str", "int", "float", "bool", "null"):
            return node.value  # timestamps and the like stay texts
        try:
            value = self.yaml.constructor.construct_object(node, deep=True)
        except (YAMLError, ValueError) as error:
            message = f"{node.value[:SHOWN_CHARACTERS]!r} is no {kind} that can be read"
            raise self.error(node, message) from error
        if kind == "int" and not -MAX_INT <= value <= MAX_INT:
            message = f"{node.value[:SHOWN_CHARACTERS]!r} is beyond {MAX_INT}, the largest number of a recipe"
            raise self.error(node, message)
        return value

    def check_characters(self, node: ScalarNode) -> None:
        # "\\ud800" in quotes makes a text that can be neither printed nor written to a file
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            message = f"{node.value[:SHOWN_CHARACTERS]!r} has half of a surrogate pair, which is no character"
            raise self.error(node, message)

    def error(self, node: Node, message: str) -> RecipeError:
        return RecipeError(f"{self.name}:{node.start_mark.line + 1}: {message}")
