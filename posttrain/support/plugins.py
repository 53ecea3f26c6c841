"""Loads plug-ins: modules of other packages that entry points name. One that fails breaks itself only."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from posttrain.support.heartbeat import CHILD
from posttrain.support.user_errors import OURS, last_line


class PluginWarning(UserWarning):
    """A plug-in could not be loaded."""


@dataclass(frozen=True)
class Plugin:
    """An entry point that was loaded, or could not be."""

    group: str
    """Such as ``posttrain.rewards``."""
    name: str
    value: str
    """``module`` or ``module:object``."""
    package: str
    """The installed package that has the entry point, with its version."""
    types: tuple[str, ...]
    """The types that its module defined, also where it failed after that."""
    error: str | None
    """The last line of the error; None if it was loaded."""


LOADED: dict[tuple[str, str, str], Plugin] = {}
"""Group, name and value -> what became of the entry point. Each is loaded once in a process."""


def load_plugins(group: str, registered: MutableMapping[str, Any]) -> None:
    """Load the entry points of ``group``, whose modules add pydantic models to ``registered``, by type.

    One that fails is named in a PluginWarning and left out, with the types that its module had added.
    """
    for entry in entry_points(group=group):
        key = (group, entry.name, entry.value)
        if key not in LOADED:
            LOADED[key] = plugin = _load(entry, registered)
            if plugin.error is not None and _is_main_process():
                text = f"the plug-in {described(plugin)} cannot be loaded, so it is left out: {plugin.error}"
                warnings.warn(text, PluginWarning, stacklevel=3)


def described(plugin: Plugin) -> str:
    """The entry point and its package, for messages."""
    return f"{plugin.name!r} ({plugin.value}) of the package {plugin.package}"


def missing_type(group: str, name: str) -> str:
    """What failed plug-ins of ``group`` have to do with the type ``name``, which is not there.

    It begins with ``; `` and follows an error's message. Empty if no plug-in failed.
    """
    failed = [plugin for plugin in LOADED.values() if plugin.group == group and plugin.error is not None]
    own = [plugin for plugin in failed if name in (plugin.name, *plugin.types)]
    verb = "comes" if own else "may come"
    return "".join(
        f"; type {name!r} {verb} with the package {plugin.package}, whose entry point {plugin.name!r} "
        f"failed: {plugin.error}"
        for plugin in own or failed
    )


def package_of(group: str, name: str) -> str:
    """The installed package that the type ``name`` of ``group`` comes with; a plug-in's has its version."""
    plugins = (plugin for plugin in LOADED.values() if plugin.group == group and name in plugin.types)
    return next((plugin.package for plugin in plugins), "posttrain")


def how_to_install(kind: type) -> str:
    """What installs the packages that the reward ``kind`` requires. Our extra has none of a plug-in's."""
    return "pip install 'posttrain[rewards]'" if kind.__module__.partition(".")[0] == OURS else "install them"


def _load(entry: EntryPoint, registered: MutableMapping[str, Any]) -> Plugin:
    before, error = set(registered), None
    try:
        entry.load()
        for name in set(registered) - before:
            registered[name].model_rebuild()  # raises where an annotation names nothing
    except (Exception, SystemExit) as problem:  # whatever another package's module may raise
        error = last_line(problem)
    added = tuple(name for name in registered if name not in before)
    for name in added:
        kind = registered[name]
        # Python forgets a module whose import failed, but not those that it had imported
        if kind.__module__ not in sys.modules or not kind.__pydantic_complete__:
            del registered[name]
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "?"
    return Plugin(entry.group, entry.name, entry.value, package, added, error)


def _is_main_process() -> bool:
    """Whether this is the one of several processes that tells the user."""
    first = os.environ.get("RANK", "0") == "0" and CHILD not in os.environ
    return first and multiprocessing.parent_process() is None
