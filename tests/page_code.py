"""Checks YAML and Python that a page shows, without running it."""

import ast
import difflib
import importlib
import importlib.util
import inspect
import re

from pages import ROOT
from pydantic import BaseModel

from posttrain.errors import PosttrainError
from posttrain.recipe.file import _validated, parse_recipe
from posttrain.recipe.positions import Source, parse
from posttrain.recipe.schema import Recipe


def yaml_problems(block, modules) -> list[str]:
    """What the recipe's reader says of a whole recipe, or of a fragment at its place.

    Classes of ``modules``, which the page has, and of the reader's own files cannot be loaded.
    """
    absent = "|".join(["No such file", *(f"cannot load the \\w+ '{module}:" for module in modules)])
    if block.needs:
        absent += "|cannot load the"
    return [line for line in _of_yaml(block) if not re.search(absent, line)]


def _of_yaml(block):
    part = block.marks.get("part of")
    try:
        if part is None and not re.search(r"^(stages|evaluation):", block.text, re.M):
            place = "<!-- part of: stages[].train -->, or recipe, model, stages[], ...; other YAML goes into ```text"
            return [
                f"{block.page}:{block.line}: a fragment of a recipe needs a comment that says where it goes: {place}"
            ]
        if part is None:
            parse_recipe("\n" * (block.line - 1) + block.text, block.page, checks=False)
            return []
        found = []
        for lines, text in _alternatives(block.text):
            found += _of_fragment(text, part, block.page, block.line - 1 + lines)
    except PosttrainError as error:
        return str(error).splitlines()
    return found


def _alternatives(text):
    """(lines before, text) of each part of a fragment: where a key comes again, it is another way to write it."""
    parts, keys, start = [], set(), 0
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if key := re.match(r"(\w[\w.:-]*):(\s|$)", line):
            if key[1] in keys:
                parts.append((start, "".join(lines[start:number])))
                start, keys = number, set()
            keys.add(key[1])
    return [*parts, (start, "".join(lines[start:]))]


def _of_fragment(text, part, page, before):
    if text.lstrip().startswith("- "):
        indented = "".join(f"  {line}" for line in text.splitlines(keepends=True))
        source = parse("\n" * (before - 1) + "items:\n" + indented, page)
        source.data, source.lines = source.data["items"], {p[1:]: n for p, n in source.lines.items() if p[1:]}
    else:
        source = parse("\n" * before + text, page)
    data, front = source.data, ()
    for step in reversed([] if part == "recipe" else re.findall(r"\w+|\[\]", part)):
        is_item = step == "[]"
        data = [data] if is_item and not isinstance(data, list) else data if is_item else {step: data}
        front = (0 if is_item else step, *front)
    if isinstance(source.data, list):
        front = front[:-1]
    lines = {(*front, *path): number for path, number in source.lines.items()}
    try:
        _validated(Recipe, Source(page, data, lines), {})
    except PosttrainError as error:
        missing = "missing, and it has no default"
        return [line for line in str(error).splitlines() if not line.endswith(missing)]
    return []


def python_problems(block, known) -> list[str]:
    """What is wrong with a Python block that is not run. ``known``: names that blocks before it import."""
    try:
        tree = ast.parse("\n" * (block.line - 1) + block.text, block.page)
    except SyntaxError as error:
        return [f"{block.page}:{error.lineno}: no Python: {error.msg}"]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                known.update(_imported(node))
            except (ImportError, AttributeError) as error:
                found.append(f"{block.page}:{node.lineno}: {error}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = _resolved(node.value, known)
            if owner is not None and not _has(owner, node.attr):
                found.append(
                    f"{block.page}:{node.lineno}: {ast.unparse(node)}: {owner.__name__} has no {node.attr!r}"
                )
        if isinstance(node, ast.Call) and (called := _resolved(node.func, known)) is not None:
            takes = _keywords(called)
            found += [
                f"{block.page}:{node.lineno}: {ast.unparse(node.func)} takes no {k.arg!r}: {', '.join(takes)}"
                for k in node.keywords
                if takes is not None and k.arg is not None and k.arg not in takes
            ]
    return list(dict.fromkeys(found))


def _imported(node):
    """Name -> object of what an import makes known. Packages that are not installed are left out."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if _installed(alias.name):
                module = importlib.import_module(alias.name)
                top = importlib.import_module(alias.name.partition(".")[0])
                yield (alias.asname, module) if alias.asname else (alias.name.partition(".")[0], top)
    elif node.module and _installed(node.module):
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")  # raises, or it is a module
            yield alias.asname or alias.name, getattr(module, alias.name)


def _installed(module):
    """Whether the package is here. Raises ImportError if its name is that of one that is, misspelt."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is not None:
        return True
    if near := difflib.get_close_matches(
        package, ("posttrain", "torch", "diffusers", "transformers"), 1, 0.8
    ):
        raise ImportError(f"no package {package!r} (did you mean {near[0]!r}?)")
    return False


def _resolved(node, known):
    """The module, class or function that ``node`` names, or None."""
    if isinstance(node, ast.Name):
        found = known.get(node.id)
    elif isinstance(node, ast.Attribute) and (owner := _resolved(node.value, known)) is not None:
        found = getattr(owner, node.attr, None)
    else:
        return None
    return found if inspect.ismodule(found) or inspect.isclass(found) or inspect.isfunction(found) else None


def _has(owner, name):
    fields = getattr(owner, "model_fields", {})
    return hasattr(owner, name) or name in fields or name in getattr(owner, "__annotations__", {})


def _keywords(called):
    """The keyword arguments that ``called`` takes, or None if they are any."""
    if inspect.isclass(called) and issubclass(called, BaseModel):
        return [*called.model_fields]
    try:
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else [p.name for p in parameters]


def copy_problems(block) -> list[str]:
    """A block that is a copy of a file has lines of that file, one after the other."""
    file = ROOT / block.marks["copy of"]
    if not file.is_file():
        return [f"no file {block.marks['copy of']!r} in the repository"]
    return [] if block.text in file.read_text() else [f"not as in {block.marks['copy of']}:\n{block.text}"]
