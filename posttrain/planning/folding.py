"""Counts the work of a transformer's equal blocks from three of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Mark = Callable[[int], None]
"""Called where a block's work begins, with the number of equal blocks that this block stands for."""


@dataclass(frozen=True)
class Kept:
    """A block that stays, and how many blocks its forward and its backward stand for.

    Of three equal blocks, the first and the second free what came before the blocks, which is of another
    size. So the third stands for the forward of the blocks that are left out, and the second for their
    backward, which comes from the other side.
    """

    block: nn.Module
    forward: int = 1
    backward: int = 1


@contextmanager
def folded(transformer: nn.Module, mark: Mark) -> Iterator[None]:
    """Keep three of equal neighbouring blocks inside the ``with`` block, and call ``mark`` between blocks.

    The marks come where a block's forward ends and where its backward begins. A forward that the backward
    computes again makes none.
    """
    with ExitStack() as stack:
        blocks: list[Kept] = []
        for name, child in list(transformer.named_children()):
            if isinstance(child, nn.ModuleList):
                kept = _kept(list(child))
                setattr(transformer, name, nn.ModuleList([one.block for one in kept]))
                stack.callback(setattr, transformer, name, child)
                blocks += kept
        begun: set[int] = set()
        for i, one in enumerate(blocks):
            following = blocks[i + 1].forward if i + 1 < len(blocks) else 1
            hook = _at_end(i, following, one.backward, mark, begun)
            stack.callback(one.block.register_forward_hook(hook).remove)
        yield


def _at_end(i: int, following: int, backward: int, mark: Mark, begun: set[int]) -> Callable[..., None]:
    """The forward hook of block ``i``. ``begun`` has the blocks whose backward has begun."""

    def backward_begins(_: Tensor) -> None:
        if i not in begun:  # a block has several outputs
            begun.add(i)
            mark(backward)

    def forward_ended(_module: nn.Module, _inputs: object, outputs: Any) -> None:
        if begun:
            return
        mark(following)
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(backward_begins)

    return forward_ended


def _kept(blocks: list[nn.Module]) -> list[Kept]:
    kept: list[Kept] = []
    for _, group in groupby(blocks, key=_shape):
        equal = list(group)
        if (others := len(equal) - 3) > 0:
            first, second, third = equal[:3]
            kept += [Kept(first), Kept(second, backward=1 + others), Kept(third, forward=1 + others)]
        else:
            kept += [Kept(block) for block in equal]
    return kept


def _shape(block: nn.Module) -> tuple[str, tuple[tuple[str, torch.Size, torch.dtype, bool], ...]]:
    """What blocks that do equal work have in common."""
    weights = ((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
    return repr(block), tuple(weights)
