"""Post-training of rectified-flow text-to-image models: ``posttrain run recipe.yaml``, or :func:`run`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.optim.settings import Train
    from posttrain.recipe.evaluation_block import Evaluation
    from posttrain.recipe.file import load_recipe
    from posttrain.recipe.schema import Recipe
    from posttrain.recipe.stage_block import Stage
    from posttrain.stages.chain import run
    from posttrain.stages.result import RunResult, open_run

__version__ = "0.1.0"
__all__ = ["Evaluation", "Recipe", "RunResult", "Stage", "Train", "load_recipe", "open_run", "run"]

# peft imports bitsandbytes if it is installed, which then warns about a 4-bit kernel that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# transformers warns of missing torchvision when diffusers is imported; posttrain does without it
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

_HOMES = {
    "Evaluation": "posttrain.recipe.evaluation_block",
    "Recipe": "posttrain.recipe.schema",
    "RunResult": "posttrain.stages.result",
    "Stage": "posttrain.recipe.stage_block",
    "Train": "posttrain.optim.settings",
    "load_recipe": "posttrain.recipe.file",
    "open_run": "posttrain.stages.result",
    "run": "posttrain.stages.chain",
}


def __getattr__(name: str) -> Any:
    # imported on first use, so that `posttrain --help` does not wait for torch
    if name not in _HOMES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    import importlib

    importlib.import_module("posttrain.recipe.messages")  # it words the errors of what is made in Python
    return getattr(importlib.import_module(_HOMES[name]), name)
