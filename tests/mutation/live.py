"""Finds the functions of a module: in its code, and as the objects of the running process."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType


def live_functions(files: set[str]):
    """All functions of ``files`` by (file, qualified name, first line), and the caches of the repository."""
    functions: dict[tuple[str, str, int], list[FunctionType]] = {}
    caches, root = [], str(Path.cwd())
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename in files:
            code = thing.__code__
            key = (code.co_filename, code.co_qualname, code.co_firstlineno)
            functions.setdefault(key, []).append(thing)
        elif type(thing) is functools._lru_cache_wrapper:
            code = getattr(thing.__wrapped__, "__code__", None)
            if code is not None and code.co_filename.startswith(root):
                caches.append(thing)
    return functions, caches


def functions_of(module: CodeType) -> Iterator[tuple[tuple[str, int], CodeType]]:
    """The outermost functions in a module's code, those of classes too."""
    for code in module.co_consts:
        if isinstance(code, CodeType):
            if code.co_flags & 0x2:  # has fast locals, as functions have and class bodies have not
                yield (code.co_qualname, code.co_firstlineno), code
            else:
                yield from functions_of(code)


def nested(code: CodeType) -> Iterator[tuple[str, int]]:
    """The function and all functions inside it, by qualified name and first line."""
    yield code.co_qualname, code.co_firstlineno
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from nested(inner)
