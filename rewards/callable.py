"""Scores images by a Python function of the user, which a recipe names as ``module:function``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from posttrain.errors import RewardError
from posttrain.reward import Reward, Scores
from posttrain.support import user_code

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

    function: Annotated[
        str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", examples=["my_module:my_function"])
    ]
    """``module:function``."""

    @property
    def label(self) -> str:
        return self.function.partition(":")[2]

    def about(self) -> str:
        return f"What the function {self.function} returns."

    def problem(self) -> str | None:
        if (problem := user_code.problem(self.function)) is None and user_code.is_class(self.function):
            return self._no_function()
        return problem

    def load(self, device: torch.device) -> Scorer:
        del device
        function = self._function()

        def score(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            return Scores(torch.as_tensor(function(images, prompts, metadata), dtype=torch.float32))

        return score

    def source_files(self) -> dict[str, Path]:
        modules = (user_code.split(self.function)[0], getattr(self._function(), "__module__", None))
        return user_code.loaded_files(filter(None, modules))

    def _function(self) -> Any:
        """The function, of which the module is run. Raises RewardError."""
        try:
            found = user_code.load(self.function)
        except Exception as error:  # whatever a person's own file may raise when it is run
            raise RewardError(f"cannot load the reward {self.function!r}: {error}") from error
        if isinstance(found, type) and issubclass(found, Reward):
            raise RewardError(self._no_function())
        if not callable(found):
            raise RewardError(f"{self.function!r} is {type(found).__name__}, no function")
        return found

    def _no_function(self) -> str:
        block = f"[{{type: {self.function!r}}}]"
        return f"{self.function!r} is a class of rewards, no function: write rewards: {block}"
