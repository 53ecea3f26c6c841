"""Exceptions for problems that the user can fix; their messages name the cause and the remedy.

Each class also inherits the built-in exception that it specialises, so callers may catch either.
"""

from __future__ import annotations


class PosttrainError(Exception):
    """Base class. The command line prints the message without a traceback."""


class InstallError(PosttrainError, ImportError):
    """The install lacks a part of the package."""


class RecipeError(PosttrainError, ValueError):
    """The recipe is not valid or cannot run on this machine."""


class DataError(PosttrainError, ValueError):
    """Images, captions or prompts cannot be used."""


class ModelError(PosttrainError, ValueError):
    """Weights are missing, do not fit the model, or cannot be read."""


class TrainingError(PosttrainError, RuntimeError):
    """Training cannot continue, for example because the loss is not finite."""


class RewardError(PosttrainError, RuntimeError):
    """A reward failed or returned something other than scores."""
