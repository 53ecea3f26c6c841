"""The interface of a reward, which scores images for their prompts.

To add a reward, subclass :class:`Reward` with a ``type``, a ``range`` and :meth:`Reward.load`.
"""

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
    """A scoring function: (images (n, 3, h, w) float32 in [0, 1], n prompts, n metadata rows) -> Scores."""


@dataclass(frozen=True)
class Scores:
    """The scores of n images."""

    value: Tensor
    """(n,) float: the scores that training uses. Tables show them under the reward's name."""
    details: dict[str, Tensor] = field(default_factory=dict)
    """Further scores by name, each (n,) float. Tables show them as ``reward/detail``."""

    def named(self, name: str, i: int) -> dict[str, float]:
        """The score of image ``i`` under ``name``, the reward's, and its details under ``name/detail``."""
        details = {f"{name}/{detail}": float(values[i]) for detail, values in self.details.items()}
        return {name: float(self.value[i]), **details}


class Reward(Named, ABC):
    """A reward and its settings, as a recipe gives them. Only :meth:`load` reads weights."""

    range: ClassVar[tuple[float, float]]
    """The lowest and the highest possible score; either may be infinite."""
    higher_is_better: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages that :meth:`load` imports and that posttrain itself does not depend on."""
    weights: ClassVar[Mapping[str, Weights]] = {}
    """Name of a field -> the files needed from the hub repository or local copy that the field names."""

    unmeasured: ClassVar[frozenset[str]] = frozenset({"weight"})
    """Names of fields that do not change the scores, such as a batch size. Result cards leave them out."""

    weight: float = Field(1.0, gt=0)
    """The factor of this reward in the weighted sum that an online algorithm maximises."""

    @property
    def label(self) -> str:
        """The name of the scores in tables and records."""
        return self.type

    def problem(self) -> str | None:
        """Say why the reward cannot be loaded; None if nothing is missing. Loads and downloads nothing."""
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        if missing:
            names = ", ".join(map(repr, missing))
            return f"{self.type} needs {names}, which this install lacks: pip install 'posttrain[rewards]'"
        for name, weights in self.weights.items():
            source = getattr(self, name)
            if is_path(source, hub=True) and weights.local(source) is None:
                return f"{name}: no {' and '.join(weights.files)} at {source!r}"
        return None

    def prompt_problem(self, row: Mapping[str, Any]) -> str | None:
        """Say why the prompt in ``row``, with its metadata, cannot be scored; None if it can."""
        del row
        return None

    def located(self, name: str) -> Path:
        """The folder or file of the weights that field ``name`` names, downloaded if it is not here.

        Raises RewardError, which says how to give a local copy.
        """
        try:
            return self.weights[name].located(getattr(self, name))
        except RewardError as error:
            raise RewardError(
                f"{self.type}: {error}. Run 'posttrain rewards fetch {self.type}' on a machine that reaches "
                f"the hub, or give a local copy as '{name}'"
            ) from error

    def measures(self) -> dict[str, Any]:
        """The settings that scores depend on. Weights are left out, since :meth:`hashes` identifies them."""
        return self.model_dump(mode="json", exclude={*self.weights, *self.unmeasured})

    def hashes(self) -> dict[str, dict[str, str]]:
        """Name of a field of :attr:`weights` -> file -> SHA-256 of the file that :meth:`load` reads."""
        return {name: weights.hashes(self.located(name)) for name, weights in self.weights.items()}

    @abstractmethod
    def load(self, device: torch.device) -> Scorer:
        """Load the networks on ``device`` and return the scoring function. Heavy imports happen here."""


def checked(name: str, score: Scorer) -> Scorer:
    """Wrap ``score`` so that every failure raises a RewardError that names the reward and a prompt.

    A failure is an exception, a wrong number of scores, or a score that is not finite. So a score that could
    not be computed never becomes a number that training would follow.
    """

    def call(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        import torch

        try:
            with torch.no_grad():  # set here, since it does not carry over from another thread
                scores = score(images, prompts, metadata)
        except Exception as error:
            example = prompts[0] if prompts else ""
            raise RewardError(f"reward {name!r} failed on prompts such as {example!r}: {error}") from error
        for key, values in {"value": scores.value, **scores.details}.items():
            if tuple(values.shape) != (len(prompts),):
                raise RewardError(
                    f"reward {name!r} returned {key} of shape {tuple(values.shape)} for {len(prompts)} images"
                )
            if not bool(values.isfinite().all()):
                first = int((~values.isfinite()).nonzero()[0])
                raise RewardError(f"reward {name!r} returned {values[first]} for prompt {prompts[first]!r}")
        return scores

    return call
