"""How each weight is spread over the processes of a run."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from posttrain.policy.piece import Piece


class Layout:
    """The layout of whole weights: each process holds all of them. Sharded layouts derive from it."""

    sharded: ClassVar[bool] = False
    """Whether each process holds a shard of each weight, so that a forward must gather it."""
    offloaded = False
    """Whether weights are held in the CPU's memory while the forwards run on a GPU."""

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of the whole weight."""
        return parameter.shape

    def local(self, parameter: nn.Parameter) -> Tensor:
        """The part of a weight that this process holds, as a plain tensor that may be written to."""
        return parameter.data

    def piece(self, parameter: nn.Parameter, held: Tensor) -> Piece:
        """``held``, a tensor that lies like the parameter's local part, as a piece of a whole one."""
        return Piece(held, self.shape(parameter), everywhere=True)

    def gathered(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        """The whole tensor whose local part is ``held``. Every process must call it at the same time."""
        del parameter
        return held

    def shard(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This process's part of ``whole``, a value for the parameter. No other process takes part."""
        return whole.to(parameter.device)

    def synchronize(self) -> None:
        """To be called before writing to local parts."""
        if self.offloaded:
            # a forward may still be copying them to the GPU
            torch.cuda.synchronize()

    def mark_written(self) -> None:
        """To be called after writing to local parts, whose gathered copies are then stale."""
