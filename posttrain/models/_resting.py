"""Where do the weights of text encoders and autoencoder lie while nobody needs them?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

HOST = torch.device("cpu")


class Resting:
    """Frozen modules that live on a device, or in the CPU's memory and on the device only while they work.

    The CPU keeps its copy, so nothing is written back when the work is done.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        """Tensors that rest, each with its copy in the CPU's memory."""

    def settle(self) -> None:
        """Put the modules on the device, to stay."""
        for module in self.modules:
            module.to(self.device)

    def rest(self) -> None:
        """From here on the modules are on the device only while they work."""
        if self._kept is None:
            self._kept = [(tensor, tensor.data.to(HOST)) for tensor in self._tensors()]
            self._return()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within the block the modules are on the device."""
        if self._kept is None:
            yield
            return
        try:
            for tensor, kept in self._kept:
                tensor.data = kept.to(self.device, copy=True)
            yield
        finally:
            self._return()

    def _return(self) -> None:
        for tensor, kept in self._kept or ():
            tensor.data = kept

    def _tensors(self) -> list[torch.Tensor]:
        return [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
