"""Holds configurations and licences of published models, for plans and model cards without their files.

Each public module has ``CONFIGS``, hub name -> component -> the configuration as diffusers or transformers
reads it, and ``LICENCES``, hub name -> the entries of its card's front matter that name its licence.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

_NAMES = [module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"]
_MODULES = [importlib.import_module(f"{__name__}.{name}") for name in _NAMES]

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    name: configs for module in _MODULES for name, configs in module.CONFIGS.items()
}
"""The configurations of all these modules."""
LICENCES: dict[str, dict[str, str]] = {
    name: licence for module in _MODULES for name, licence in module.LICENCES.items()
}
"""The licences of all these modules."""
