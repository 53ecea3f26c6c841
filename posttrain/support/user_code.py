"""Finds what a recipe names as ``module:name``: classes and functions of the user's own modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from posttrain.support.names import class_home, defined_names
from posttrain.support.spelling import meant
from posttrain.support.user_errors import with_place


def split(named: str) -> tuple[str, str]:
    """The module and the name in ``named``."""
    module, _, name = named.partition(":")
    return module, name


def problem(named: str) -> str | None:
    """Say why ``named`` is not there; None if it is, or if only running its module would tell.

    The module is not run, which may take long. Packages above it are imported.
    """
    module, name = split(named)
    if module in sys.modules:
        return None if hasattr(sys.modules[module], name) else f"the module {module!r} has no {name!r}"
    if (spec := _found(module)) is None:
        return _no_module(module)
    try:
        names = defined_names(spec)
    except SyntaxError as error:
        return f"the module {module!r} is no Python: {error}"
    if names is None or name in names:
        return None
    return f"the module {module!r} ({spec.origin}) has no {name!r}{meant(name, names)}"


def is_class(named: str) -> bool:
    """Whether ``named`` names a class, as far as the source tells: the module is not run."""
    seen = set[str]()
    while named not in seen:
        seen.add(named)
        module, name = split(named)
        if module in sys.modules:
            return isinstance(getattr(sys.modules[module], name, None), type)
        try:
            spec = _found(module)
            home = class_home(spec, name) if spec is not None else None
        except Exception:  # whatever a package above the module may raise; loading will tell
            return False
        if home is None:
            return False
        if home == (module, name):
            return True
        named = ":".join(home)
    return False


def load(named: str) -> Any:
    """The object that ``named`` names. The module may be installed, or lie in the current folder.

    Raises ImportError if there is no such module or name, or if the module fails when it is run.
    """
    module, name = split(named)
    if module not in sys.modules and _found(module) is None:
        raise ImportError(_no_module(module))
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever a person's own file may raise
        raise ImportError(with_place(error)) from error
    if not hasattr(loaded, name):
        raise ImportError(f"the module {module!r} has no {name!r}{meant(name, dir(loaded))}")
    return getattr(loaded, name)


def file_of(module: str) -> Path | None:
    """The file of ``module``, which is not run; None if it has none on this machine."""
    origin = None if (spec := _found(module)) is None else spec.origin
    return Path(origin) if origin is not None and Path(origin).is_file() else None


def loaded_files(modules: Iterable[str]) -> dict[str, Path]:
    """Module -> its file, of those ``modules`` that have been run and that have a file on this machine."""
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in modules}
    return {name: Path(file) for name, file in files.items() if file and Path(file).is_file()}


def _found(module: str) -> ModuleSpec | None:
    """Where the module is; None if it is nowhere, or was made by a program that runs."""
    _search_current_folder()
    try:
        return importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None


def _no_module(module: str) -> str:
    return f"no module {module!r}, neither installed nor in the folder {Path.cwd()}"


def _search_current_folder() -> None:
    """Make modules in the current folder importable."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
