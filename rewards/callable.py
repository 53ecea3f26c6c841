"""Scores images by a Python function of the user, which a recipe names as ``module:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.errors import RewardError
from posttrain.reward import Reward, Scores

if TYPE_CHECKING:
    from posttrain.reward import Scorer


class Callable(Reward):
    """Calls ``function(images, prompts, metadata)``.

    ``images`` is an (n, 3, h, w) float32 tensor in [0, 1] on the CPU, ``prompts`` a list of n strings, and
    ``metadata`` a list of n dicts, the rows of the prompt file. The function returns n numbers as a list, an
    array or a tensor; higher is better. The module may be installed, or lie in the current folder.
    """

    type: Literal["callable"] = "callable"
    range: ClassVar = (-float("inf"), float("inf"))

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """``module:function``."""

    @property
    def label(self) -> str:
        return self.function.partition(":")[2]

    def problem(self) -> str | None:
        module = self.function.partition(":")[0]
        _search_current_folder()
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        return None if spec else f"no module {module!r}, neither installed nor in the folder {Path.cwd()}"

    def load(self, device: torch.device) -> Scorer:
        del device
        module, _, name = self.function.partition(":")
        _search_current_folder()
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever a person's own file may raise when it is run
            raise RewardError(f"cannot load the reward {self.function!r}: {error}") from error

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            return Scores(torch.as_tensor(function(images, prompts, metadata), dtype=torch.float32))

        return score


def _search_current_folder() -> None:
    """Make modules in the current folder importable."""
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
