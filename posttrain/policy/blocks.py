"""Which modules does a transformer repeat? They are cut in parts, compiled, or computed again, one by one."""

from __future__ import annotations

from torch import nn


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: the entries of its lists of modules."""
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList)]
    return [block for entries in lists for block in entries]
