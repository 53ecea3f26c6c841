"""What do rewards with networks share: the images of one pass, and where the networks wait?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from posttrain.reward import Reward, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from posttrain.reward import Scorer


class Neural(Reward, ABC):
    """A reward whose networks, once loaded, stay for the run."""

    unmeasured: ClassVar = Reward.unmeasured | {"batch_size", "offload"}

    batch_size: int = Field(16, ge=1)
    """Images that go through the network at a time."""
    offload: bool = False
    """Keep the networks in main memory between uses: each use waits for their way to the GPU and back, whose
    memory is free for the rest of the time."""

    @abstractmethod
    def scorer(self, device: torch.device) -> Scorer:
        """As :meth:`load`; every network is put on ``device`` by :func:`posttrain.rewards._state.frozen`."""

    def load(self, device: torch.device) -> Scorer:
        import torch

        from posttrain.rewards._state import collected

        with collected() as networks:
            score = self.scorer(device)
        if not self.offload:
            return score

        def place(where: torch.device) -> None:
            for network in networks:
                network.to(where)

        def visiting(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
            try:
                place(device)
                return score(images, prompts, metadata)
            finally:
                place(torch.device("cpu"))

        place(torch.device("cpu"))
        return visiting
