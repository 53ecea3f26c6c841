"""What a reward answers: how good is each of these images, given its prompt?"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from posttrain.errors import RewardError
from posttrain.registry import Named
from posttrain.support.paths import is_path
from posttrain.weights.published import Weights

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

    def named(self, name: str, i: int) -> dict[str, float]:
        """Image ``i``'s score under the reward's ``name``, and its details under ``name/detail``."""
        details = {f"{name}/{detail}": float(values[i]) for detail, values in self.details.items()}
        return {name: float(self.value[i]), **details}


class Reward(Named, ABC):
    """A way to score images. Fields are its settings; what is heavy is loaded by :meth:`load`."""

    range: ClassVar[tuple[float, float]]
    """Lowest and highest score possible (may be infinite)."""
    higher_is_better: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages, beyond posttrain's own dependencies, that :meth:`load` imports."""
    weights: ClassVar[Mapping[str, Weights]] = {}
    """Field -> what is needed of the repository, or of the local copy, that the field names."""

    unmeasured: ClassVar[frozenset[str]] = frozenset({"weight"})
    """Fields that say how scores are computed or used, and do not change them."""

    weight: float = Field(1.0, gt=0)
    """How much this reward counts in the weighted sum that an online algorithm maximises."""

    @property
    def label(self) -> str:
        """What the scores are called in tables and records."""
        return self.type

    def problem(self) -> str | None:
        """Why the reward cannot be loaded, as far as can be seen without loading; None if it can."""
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        if missing:
            names = ", ".join(map(repr, missing))
            return f"{self.type} needs the package(s) {names}: pip install 'posttrain[rewards]'"
        for name, weights in self.weights.items():
            source = getattr(self, name)
            if is_path(source, hub=True) and weights.local(source) is None:
                return f"{name}: no {' and '.join(weights.files)} at {source!r}"
        return None

    def unusable(self, row: Mapping[str, Any]) -> str | None:
        """Why a prompt, with its metadata, cannot be scored; None if it can."""
        del row
        return None

    def located(self, name: str) -> Path:
        """The folder, or the file, of the weights that field ``name`` stands for, fetched if need be.

        Raises RewardError, which says how to give a local copy."""
        try:
            return self.weights[name].located(getattr(self, name))
        except RewardError as error:
            words = f"{self.type}: {error}. Run 'posttrain rewards fetch {self.type}' on a machine that can"
            raise RewardError(f"{words}, or give a local copy as '{name}'") from error

    def measures(self) -> dict[str, Any]:
        """The settings that scores depend on; where weights lie is none, their :meth:`hashes` tell."""
        return self.model_dump(mode="json", exclude={*self.weights, *self.unmeasured})

    def hashes(self) -> dict[str, dict[str, str]]:
        """For each field of :attr:`weights`: file -> SHA-256 of what :meth:`load` reads."""
        return {name: weights.hashes(self.located(name)) for name, weights in self.weights.items()}

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
