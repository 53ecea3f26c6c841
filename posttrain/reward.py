"""The interface of a reward, which scores images for their prompts.

To add a reward, subclass :class:`Reward` with a ``type``, a ``range`` and :meth:`Reward.load`.
"""

from __future__ import annotations

import copy
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from posttrain.errors import NotFinite, PosttrainError, RewardError
from posttrain.registry import FREE, Named
from posttrain.support import user_code
from posttrain.support.paths import is_path
from posttrain.support.plugins import how_to_install
from posttrain.support.user_errors import with_lines
from posttrain.support.wording import described
from posttrain.weights.files import sha256
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

    weight: float = Field(default=1.0, gt=0, le=1e9)
    """The factor of this reward in the weighted sum that an online algorithm maximises."""
    limit_minutes: Annotated[float | None, FREE] = Field(default=20.0, gt=0)
    """Minutes in which one batch of images must be scored, all retries included; else the run stops. null for
    no limit."""

    @property
    def label(self) -> str:
        """The name of the scores in tables and records."""
        return self.type

    def about(self) -> str:
        """What the score measures, for a report: the first paragraph of the class's docstring, or of that of
        a reward that it inherits from; "" if there is none."""
        return described(type(self), Reward)

    def problem(self) -> str | None:
        """Say why the reward cannot be loaded; None if nothing is missing. Loads and downloads nothing."""
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        if missing:
            names = ", ".join(map(repr, missing))
            return f"{self.type} needs {names}, which this install lacks: {how_to_install(type(self))}"
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
        """The settings that scores depend on, which are not marked FREE. The weights are left out, since
        :meth:`hashes` identifies them."""
        out = {"weight", *self.weights}
        return {name: value for name, value in self.deciding().items() if name not in out}

    def weight_files(self) -> dict[str, Path]:
        """Field of :attr:`weights` and file -> the file that :meth:`load` reads."""
        return {
            f"{name}/{file}": path
            for name, weights in self.weights.items()
            for file, path in weights.paths(self.located(name)).items()
        }

    def source_files(self) -> dict[str, Path]:
        """Module -> its file, of the source outside this package that computes the scores: that of the class,
        and of classes that it inherits from. Raises RewardError if it cannot be loaded."""
        modules = dict.fromkeys(kind.__module__ for kind in type(self).__mro__ if issubclass(kind, Reward))
        own = [name for name in modules if name.partition(".")[0] != "posttrain"]
        return user_code.loaded_files(own)

    def hashes(self) -> dict[str, dict[str, str]]:
        """Name of a field of :attr:`weights` -> file -> SHA-256 of the file that :meth:`load` reads; and
        ``source`` -> module -> SHA-256 of its file, if there are :meth:`source_files`.

        Result cards keep them, so that scores by other weights, or by other source, are not compared."""
        hashes = {name: weights.hashes(self.located(name)) for name, weights in self.weights.items()}
        source = {name: sha256(file) for name, file in self.source_files().items()}
        return {**hashes, "source": {**hashes.get("source", {}), **source}} if source else hashes

    @abstractmethod
    def load(self, device: torch.device) -> Scorer:
        """Load the networks on ``device`` and return the scoring function. Heavy imports happen here."""


def checked(name: str, score: Scorer) -> Scorer:
    """Wrap ``score`` so that every failure raises a RewardError that names the reward and a prompt.

    A failure is an exception, anything but Scores of tensors, a wrong number of scores, or an image or score
    that is not finite in float32 (NotFinite). So a score that could not be computed never becomes a number
    that training would follow. The reward gets copies: whatever it changes in its arguments, other rewards
    and the saved images do not see.
    """

    def call(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        import torch

        check_finite(images, prompts)
        try:
            with torch.no_grad():  # set here, since it does not carry over from another thread
                scores = score(images.clone(), list(prompts), copy.deepcopy(list(metadata)))
        except NotFinite as error:
            raise NotFinite(f"reward {name!r} has no score: {error}", error.positions) from error
        except Exception as error:
            example = prompts[0] if prompts else ""
            why = str(error) if isinstance(error, PosttrainError) else with_lines(error)
            raise RewardError(f"reward {name!r} failed on prompts such as {example!r}: {why}") from error
        if not isinstance(scores, Scores):
            raise RewardError(f"reward {name!r} returned {type(scores).__name__}, where Scores are expected")
        if not isinstance(scores.details, dict):
            raise RewardError(f"reward {name!r} returned details as {type(scores.details).__name__}, no dict")
        for key, values in {"value": scores.value, **scores.details}.items():
            if not isinstance(values, torch.Tensor):
                raise RewardError(
                    f"reward {name!r} returned {key} as {type(values).__name__}, not as a tensor"
                )
            if tuple(values.shape) != (len(prompts),):
                raise RewardError(
                    f"reward {name!r} returned {key} of shape {tuple(values.shape)} for {len(prompts)} images"
                )
            # a score of 1e39 is finite in float64 alone
            if bad := (~values.float().isfinite()).nonzero().flatten().tolist():
                what = f"{values[bad[0]]} for prompt {prompts[bad[0]]!r}"
                raise NotFinite(f"reward {name!r} returned {what}", bad)
        return scores

    return call


def check_finite(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise NotFinite if a value of ``images`` (n, 3, h, w), drawn for n ``prompts``, is NaN or infinite."""
    if bad := (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        raise NotFinite(
            f"the image for prompt {prompts[bad[0]]!r} is not finite, so it is not used ({len(bad)} of "
            f"{len(prompts)} images): the model's weights or autoencoder overflow or are damaged",
            bad,
        )
