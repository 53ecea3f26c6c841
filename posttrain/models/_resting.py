"""Keeps text encoders and the autoencoder in the CPU's memory while they do not work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

HOST = torch.device("cpu")


class Resting:
    """Frozen modules that stay on a device, or rest in the CPU's memory and are copied to the device to work.

    The CPU keeps its copy, so nothing is copied back after the work.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self.modules, self.device = modules, device
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        """The resting tensors, each with its copy in the CPU's memory; None if the modules do not rest."""

    def settle(self) -> None:
        """Move the modules to the device for good."""
        for module in self.modules:
            module.to(self.device)

    def rest(self) -> None:
        """Move the modules to the CPU's memory. From now on they are on the device only inside
        :meth:`working`."""
        if self._kept is None:
            self._kept = [(tensor, tensor.data.to(HOST)) for tensor in self._tensors()]
            self._return()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside this block the modules are on the device."""
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
