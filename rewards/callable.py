"""A reward of your own: any Python function, named as ``module:function``."""

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

    ``images`` is an (n, 3, h, w) float32 tensor in [0, 1] on the CPU, ``prompts`` has n strings and
    ``metadata`` n dicts, what the prompt file says of each. It returns n numbers (a list, an array or a
    tensor), the higher the better. Modules in the current folder are found too.
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
        _find_here()
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        return None if found else f"no module {module!r}, neither installed nor in the folder {Path.cwd()}"

    def load(self, device: torch.device) -> Scorer:
        del device
        module, _, name = self.function.partition(":")
        _find_here()
        try:
            function = getattr(importlib.import_module(module), name)
        except Exception as error:  # whatever a person's own file may raise when it is run
            raise RewardError(f"cannot load the reward {self.function!r}: {error}") from error

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            return Scores(torch.as_tensor(function(images, prompts, metadata), dtype=torch.float32))

        return score


def _find_here() -> None:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
