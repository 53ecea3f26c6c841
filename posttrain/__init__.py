"""Post-training of rectified-flow text-to-image models: ``posttrain run recipe.yaml``, or from Python."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.chain import run
    from posttrain.recipe import Recipe
    from posttrain.recipe_file import load_recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "load_recipe", "run"]

# peft imports bitsandbytes where it is installed, which then warns of a 4-bit product that nobody here needs
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {"Recipe": "posttrain.recipe", "load_recipe": "posttrain.recipe_file", "run": "posttrain.chain"}


def __getattr__(name: str) -> Any:
    # `posttrain --help` must not wait for torch
    if name not in _HOMES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
