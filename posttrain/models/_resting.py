"""Keeps text encoders and the autoencoder in the CPU's memory while they do not work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

HOST = torch.device("cpu")


class Resting:
    """Frozen modules that stay on a device, or rest in the CPU's memory and are copied to the device to work.

    The CPU keeps its copy, so nothing is copied back after the work.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device, *, by_block: bool = False) -> None:
        """``by_block``: a block, an entry of a module list, is on the device only while it is called. So the
        device needs room for one block at a time, and as many bytes travel."""
        self.modules, self.device = modules, device
        self.blocks = [b for m in modules for b in _blocks(m)] if by_block else []
        self._kept: dict[int, torch.Tensor] | None = None
        """The id of each resting tensor -> its copy in the CPU's memory; None if the modules do not rest."""

    def settle(self) -> None:
        """Move the modules to the device for good."""
        for module in self.modules:
            module.to(self.device)

    def rest(self) -> None:
        """Move the modules to the CPU's memory. From now on they are on the device only inside
        :meth:`working`."""
        if self._kept is None:
            self._kept = {id(tensor): tensor.data.to(HOST) for tensor in _tensors(self.modules)}
            self._leave(_tensors(self.modules))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Inside this block the modules are on the device, except for blocks that come when they are
        called."""
        if self._kept is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: self._leave(_tensors(self.modules)))
            for block in self.blocks:
                coming = block.register_forward_pre_hook(lambda block, *_: self._come(_tensors([block])))
                leaving = block.register_forward_hook(
                    lambda block, *_: self._leave(_tensors([block])), always_call=True
                )
                stack.callback(coming.remove)
                stack.callback(leaving.remove)
            self._come(self._outside())
            yield

    def bytes_at_work(self) -> int:
        """Bytes on the device while modules that rest work: all outside the blocks, and the largest block."""
        each = [sum(tensor.nbytes for tensor in _tensors([block])) for block in self.blocks]
        return sum(tensor.nbytes for tensor in self._outside()) + max(each, default=0)

    def _outside(self) -> list[torch.Tensor]:
        inside = {id(tensor) for tensor in _tensors(self.blocks)}
        return [tensor for tensor in _tensors(self.modules) if id(tensor) not in inside]

    def _come(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.data = (self._kept or {})[id(tensor)].to(self.device, copy=True)

    def _leave(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.data = (self._kept or {})[id(tensor)]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of module lists in ``module`` that are in no other entry."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _tensors(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """The parameters and buffers of ``modules``, each once."""
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return list(found.values())
