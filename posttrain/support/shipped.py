"""Imports the packages that come with posttrain, and explains an install that lacks one.

In the source tree, algorithms, rewards and recipes are folders beside ``posttrain/``, and links inside it
point to them. If the links become text files, as in a ZIP, only an install finds the folders, because
``setup.py`` maps them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from posttrain.errors import InstallError


def shipped(package: str) -> ModuleType:
    """Import ``package``, such as ``posttrain.algorithms``.

    Raises InstallError if the install lacks it. Other errors of the import pass.
    """
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package itself imports a module that is missing
            raise
        raise InstallError(_missing(package)) from None
    if module.__file__ is None:  # an interrupted copy or uninstall left a folder without __init__.py
        raise InstallError(_missing(package))
    return module


def _missing(package: str) -> str:
    parent, name = Path(__file__).parent.parent, package.rpartition(".")[2]
    folder, tree = parent / name, parent.parent
    if not (tree / "pyproject.toml").is_file():
        return (
            f"this install of posttrain has no {package}: {str(folder)!r} is missing or empty, because the "
            f"folder {name}/ was missing when the package was built or was deleted afterwards. Install "
            f"posttrain again from a complete source tree: pip install --force-reinstall --no-deps PATH"
        )
    if not (tree / name / "__init__.py").is_file():
        return (
            f"the source tree of posttrain in {str(tree)!r} is not complete: its folder {name}/ is missing "
            f"or empty. Get the tree again: git checkout, or unpack the archive anew"
        )
    fault = "is a text file, not a link" if folder.is_file() else "is not a link to it"
    return (
        f"posttrain cannot find {package}: it lies in {str(tree / name)!r}, and {str(folder)!r} {fault}. "
        f"ZIP archives and git with core.symlinks=false lose links. Install the tree, which needs no links: "
        f"pip install -e {str(tree)!r}"
    )
