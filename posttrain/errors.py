"""What goes wrong because of what the user gave, told in the user's words.

Every class also is the built-in exception it specialises, so callers may catch either.
"""

from __future__ import annotations


class PosttrainError(Exception):
    """A failure with a clear message; the command line prints it without a traceback."""


class InstallError(PosttrainError, ImportError):
    """An install that lacks a part of the package."""


class RecipeError(PosttrainError, ValueError):
    """A recipe that cannot be run."""


class DataError(PosttrainError, ValueError):
    """Images, captions or prompts that cannot be used."""


class ModelError(PosttrainError, ValueError):
    """Weights that are missing, do not fit, or cannot be read."""


class TrainingError(PosttrainError, RuntimeError):
    """A run that must not go on, such as one whose loss is not finite."""


class RewardError(PosttrainError, RuntimeError):
    """A reward that failed or returned something that is no score."""
