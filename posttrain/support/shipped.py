"""Imports the packages that come with posttrain, and says what is wrong with an install that lacks one.

In the source tree algorithms, rewards and recipes lie beside ``posttrain/``, and links in it lead to them.
Where the links arrive as text files, as from a ZIP, only an install finds them: ``setup.py`` maps them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from posttrain.errors import InstallError


def shipped(package: str) -> ModuleType:
    """Import ``posttrain.algorithms``, or another package of that kind.

    Raises InstallError where the install lacks it. Any other error of the import is raised as it is.
    """
    try:
        found = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # a module that the package imports
            raise
        raise InstallError(_missing(package)) from None
    if found.__file__ is None:  # a folder without __init__.py, as an interrupted copy or uninstall leaves it
        raise InstallError(_missing(package))
    return found


def _missing(package: str) -> str:
    parent, name = Path(__file__).parent.parent, package.rpartition(".")[2]
    place, tree = parent / name, parent.parent
    if not (tree / "pyproject.toml").is_file():
        return (
            f"this install of posttrain has no {package}: {str(place)!r} is missing or empty, because the "
            f"folder {name}/ was missing when the package was built or was deleted afterwards. Install "
            f"posttrain again from a complete source tree: pip install --force-reinstall --no-deps PATH"
        )
    if not (tree / name / "__init__.py").is_file():
        return (
            f"the source tree of posttrain in {str(tree)!r} is not complete: its folder {name}/ is missing "
            f"or empty. Get the tree again: git checkout, or unpack the archive anew"
        )
    what = "is a text file, not a link" if place.is_file() else "is not a link to it"
    return (
        f"posttrain cannot find {package}: it lies in {str(tree / name)!r}, and {str(place)!r} {what}. "
        f"ZIP archives and git with core.symlinks=false lose links. Install the tree, which needs no links: "
        f"pip install -e {str(tree)!r}"
    )
