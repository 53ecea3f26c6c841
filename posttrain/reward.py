"""What a reward answers: how good is each of these images, given its prompt?"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from posttrain.errors import RewardError
from posttrain.spec import Named

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Scorer = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, Any]]], "Scores"]
    """(images (n, 3, h, w) float32 in [0, 1], n prompts, n metadata rows) -> Scores of n values."""


@dataclass(frozen=True)
class Scores:
    """The scores of n images."""

    value: Tensor
    """(n,) float: what training uses and what the table shows under the reward's own name."""
    details: dict[str, Tensor] = field(default_factory=dict)
    """Further named verdicts, each (n,), shown as ``reward/detail``."""


class Reward(Named, ABC):
    """A way to score images. Fields are its settings; what is heavy is loaded by :meth:`load`."""

    range: ClassVar[tuple[float, float]]
    """Lowest and highest score possible (may be infinite)."""
    higher_is_better: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages, beyond posttrain's own dependencies, that :meth:`load` imports."""

    weight: float = Field(1.0, gt=0)
    """How much this reward counts in the weighted sum that an online algorithm maximises."""

    @property
    def label(self) -> str:
        """What the scores are called in tables and records."""
        return self.type

    def problem(self) -> str | None:
        """Why the reward cannot be loaded, as far as can be seen without loading; None if it can."""
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        if not missing:
            return None
        names = ", ".join(map(repr, missing))
        return f"{self.type} needs the package(s) {names}: pip install 'posttrain[rewards]'"

    def unusable(self, row: Mapping[str, Any]) -> str | None:
        """Why a prompt, with its metadata, cannot be scored; None if it can."""
        del row
        return None

    @abstractmethod
    def load(self, device: torch.device) -> Scorer:
        """The scoring function, its networks on ``device``. Heavy imports happen here."""


def checked(name: str, score: Scorer) -> Scorer:
    """``score`` that raises RewardError, naming the reward and a prompt, where a result is no score.

    Refused are a wrong count and values that are not finite; an exception inside is named and kept as
    the cause. A score that could not be computed never becomes a number (correctness rule 38).
    """

    def call(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        import torch

        try:
            with torch.no_grad():  # which does not reach from the training thread into a worker
                scores = score(images, prompts, metadata)
        except Exception as error:
            shown = prompts[0] if prompts else ""
            raise RewardError(f"reward {name!r} failed on prompts such as {shown!r}: {error}") from error
        for key, values in {"value": scores.value, **scores.details}.items():
            if tuple(values.shape) != (len(prompts),):
                raise RewardError(
                    f"reward {name!r} returned {key} of shape {tuple(values.shape)} for {len(prompts)} images"
                )
            if not bool(values.isfinite().all()):
                worst = int((~values.isfinite()).nonzero()[0])
                raise RewardError(f"reward {name!r} returned {values[worst]} for prompt {prompts[worst]!r}")
        return scores

    return call
