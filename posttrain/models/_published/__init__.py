"""Holds configurations and licences of published models, for plans and model cards without their files.

Each module has ``CONFIGS``, hub name -> component -> the configuration as diffusers or transformers reads it,
and ``LICENCES``, hub name -> the entries of its card's front matter that name its licence.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    name: configs for module in _MODULES for name, configs in module.CONFIGS.items()
}
"""The configurations of all modules."""
LICENCES: dict[str, dict[str, str]] = {
    name: licence for module in _MODULES for name, licence in module.LICENCES.items()
}
"""The licences of all modules."""
