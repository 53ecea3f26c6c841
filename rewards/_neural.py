"""The base of rewards with networks, with their batch size and offloading."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from posttrain.registry import FREE
from posttrain.reward import Reward, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.reward import Scorer


class Neural(Reward, ABC):
    """A reward whose networks are loaded once and stay in memory for the run."""

    batch_size: Annotated[int, FREE] = Field(default=16, ge=1)
    """Images in one forward of the network."""
    offload: Annotated[bool, FREE] = False
    """Keep the networks in main memory between uses. This frees GPU memory, but each use takes longer, by the
    time to copy them to the GPU and back."""

    @abstractmethod
    def scorer(self, device: torch.device) -> Scorer:
        """Load the networks and return the scoring function, as :meth:`load` does.

        Move every network to ``device`` by :func:`posttrain.rewards._state.frozen`; offloading needs that.
        """

    def load(self, device: torch.device) -> Scorer:
        import torch

        from posttrain.rewards._state import collected

        with collected() as networks:
            score = self.scorer(device)
        if not self.offload:
            return score

        def move_to(target: torch.device) -> None:
            for network in networks:
                network.to(target)

        def on_device(
            images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
        ) -> Scores:
            try:
                move_to(device)
                return score(images, prompts, metadata)
            finally:
                move_to(torch.device("cpu"))

        move_to(torch.device("cpu"))
        return on_device
