"""Float32 masters of trained weights, beside a module that computes with them in lower precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

ADDED_AT_ONCE = 2**26
"""Numbers whose gradients are made float32 at a time when they are added up: 256 MB."""


class Masters:
    """The optimizer's float32 weights; the module has a copy of each in lower precision.

    Gradients of all micro-batches are added up in float32, and the copies are made again once a step
    (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1).
    """

    def __init__(self, trained: dict[str, nn.Parameter], dtype: torch.dtype) -> None:
        """Take the float32 values of ``trained``, and leave copies in ``dtype`` in their place."""
        self.copies = dict(trained)
        """Name -> the module's own parameter, in lower precision."""
        self.weights = {name: nn.Parameter(p.data.float()) for name, p in trained.items()}
        """Name -> the float32 master."""
        for parameter in trained.values():
            parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def lower(self, names: Iterable[str] | None = None) -> None:
        """Make the copies again from the masters: those of ``names``, or all."""
        chosen = list(self.copies if names is None else names)
        _copy([self.copies[name].data for name in chosen], [self.weights[name].data for name in chosen])

    @torch.no_grad()
    def put_in(self, values: dict[str, Tensor]) -> None:
        """Give the copies other ``values``, by name. The masters keep theirs, for :meth:`lower`."""
        _copy([self.copies[name].data for name in values], list(values.values()))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Move the gradients of the copies to the masters, adding to those that are there."""
        for names in _groups(self.copies):
            low = [g for name in names if (g := self.copies[name].grad) is not None]
            masters = [self.weights[name] for name in names if self.copies[name].grad is not None]
            high = [torch.empty_like(master) for master in masters]
            _copy(high, low)
            old = [(m.grad, g) for m, g in zip(masters, high, strict=True) if m.grad is not None]
            if old:
                torch._foreach_add_([a for a, _ in old], [b for _, b in old])
            for master, gradient in zip(masters, high, strict=True):
                if master.grad is None:
                    master.grad = gradient
            for name in names:
                self.copies[name].grad = None

    def gradients(self) -> Iterator[list[Tensor]]:
        """The masters' gradients in groups of limited size. A weight that has none is left out."""
        for names in _groups(self.copies):
            if found := [g for name in names if (g := self.weights[name].grad) is not None]:
                yield found

    def drop_gradients(self) -> None:
        """Remove what a failed backward left in the module."""
        for copy in self.copies.values():
            copy.grad = None


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _groups(parameters: dict[str, nn.Parameter]) -> Iterator[list[str]]:
    """The names in groups of at most ADDED_AT_ONCE numbers, at least one in each."""
    group, numbers = [], 0
    for name, parameter in parameters.items():
        if group and numbers + parameter.numel() > ADDED_AT_ONCE:
            yield group
            group, numbers = [], 0
        group.append(name)
        numbers += parameter.numel()
    if group:
        yield group
