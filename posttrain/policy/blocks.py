"""Finds the blocks that a transformer repeats, which are sharded, compiled or recomputed one by one."""

from __future__ import annotations

from torch import nn


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: all entries of its ``nn.ModuleList`` children."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return [block for entries in lists for block in entries]
