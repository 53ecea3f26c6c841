"""Exceptions for problems that the user can fix; their messages name the cause and the remedy.

Each class also inherits the built-in exception that it specialises, so callers may catch either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class PosttrainError(Exception):
    """Base class. The command line prints the message without a traceback."""


class InstallError(PosttrainError, ImportError):
    """The install lacks a part of the package."""


class RecipeError(PosttrainError, ValueError):
    """The recipe is not valid or cannot run on this machine."""


class DamagedError(PosttrainError, ValueError):
    """A file that posttrain wrote is not as it was written: empty, cut off, or changed."""


class DataError(PosttrainError, ValueError):
    """Images, captions or prompts cannot be used."""


class ModelError(PosttrainError, ValueError):
    """Weights are missing, do not fit the model, or cannot be read."""


class TrainingError(PosttrainError, RuntimeError):
    """Training cannot continue, for example because the loss is not finite."""


class StepRefused(TrainingError):
    """A step is not taken, because its loss, gradient or rewards are not finite. All processes raise it."""

    def __init__(self, reason: str, samples: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(f"{reason} is not finite; the step was not taken")
        self.reason = reason
        self.samples = samples
        """A record for each item of this process that may be the cause; ``sample`` is its sample's position
        in the batch of all processes."""


class AlgorithmError(PosttrainError, ValueError):
    """An algorithm returned something that is not what :class:`posttrain.algorithm.Algorithm` asks for."""


class UserCodeError(PosttrainError, RuntimeError):
    """A class or function of the user's own failed; the message has its lines. ``__cause__`` is its error."""


class RewardError(PosttrainError, RuntimeError):
    """A reward failed or returned something other than scores."""


class NotFinite(RewardError):
    """Images or scores are not finite; ``positions`` are those of their samples in the batch."""

    def __init__(self, message: str, positions: Sequence[int]) -> None:
        super().__init__(message)
        self.positions = positions
