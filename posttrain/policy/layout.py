"""How each weight is laid out over the processes of a run."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class Layout:
    """How weights lie over the processes: here, each process has them whole."""

    sharded: ClassVar[bool] = False
    """Whether a forward waits for parts that other processes have."""
    offloaded = False
    """Whether what is held is in the CPU's memory while the forwards run on a GPU."""

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of the whole."""
        return parameter.shape

    def local(self, parameter: nn.Parameter) -> Tensor:
        """What this process holds of a parameter, as a plain tensor that may be written to."""
        return parameter.data

    def gathered(self, parameter: nn.Parameter, held: Tensor) -> Tensor:
        """The whole tensor of which this process holds ``held``; every process asks at once."""
        del parameter
        return held

    def shard(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """What this process holds of ``whole``, a value for the parameter. No other process is asked."""
        return whole.to(parameter.device)

    def synchronize(self) -> None:
        """To be called before writing to what is held."""
        if self.offloaded:
            # a forward that was asked for may still be copying it to the GPU
            torch.cuda.synchronize()

    def mark_written(self) -> None:
        """To be called after writing to what is held: copies of it are stale."""
