"""Post-training of rectified-flow text-to-image models: ``posttrain run recipe.yaml``, or :func:`run`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.recipe.file import load_recipe
    from posttrain.recipe.schema import Recipe
    from posttrain.stages.chain import run

__version__ = "0.1.0"
__all__ = ["Recipe", "load_recipe", "run"]

# peft imports bitsandbytes if it is installed, which then warns about a 4-bit kernel that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "Recipe": "posttrain.recipe.schema",
    "load_recipe": "posttrain.recipe.file",
    "run": "posttrain.stages.chain",
}


def __getattr__(name: str) -> Any:
    # imported on first use, so that `posttrain --help` does not wait for torch
    if name not in _HOMES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
