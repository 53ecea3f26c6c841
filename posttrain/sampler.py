"""Defines the interface between an evaluation and a model that draws images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.flow.sampling_settings import Sampling


class Sampler(ABC):
    """Samples images for prompts. An evaluation needs nothing else of a model."""

    device: torch.device
    divisor: int
    """Image sides must be multiples of this many pixels."""
    source: str
    """The origin of the weights, for the result card."""
    settings: Mapping[str, Any]
    """The other settings of the recipe's ``model`` block, for the result card."""
    forward_equivalents: int
    """The forwards of the denoiser so far, counted for each sample."""
    base: Callable[[], Mapping[str, str]] = dict
    """Gives a hash of each component of the base weights from which the sampler's weights were made."""

    @abstractmethod
    def images(self, prompts: Sequence[str], indices: Sequence[int], settings: Sampling) -> Tensor:
        """Images (n, 3, H, W) in [0, 1]: the ``indices[i]``-th of ``prompts[i]``, each from its own noise."""

    @abstractmethod
    def fingerprint(self) -> str:
        """The sha256 of the denoiser's weights."""
