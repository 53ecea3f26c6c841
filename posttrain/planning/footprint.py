"""Counts the FLOPs and bytes of a computation on torch's meta device.

The model's own code runs on tensors without content, so nothing is computed; allocations and multiplications
are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from posttrain.planning.folding import folded
from posttrain.planning.held import Held
from posttrain.planning.kernels import ATTENTION, Kernels

_ATTENTION_FLOPS: dict[Any, Any] = {ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}


def flops(forward: Callable[[], object], transformer: nn.Module) -> int:
    """FLOPs of ``forward`` on meta tensors, without gradients; a multiply-add counts 2.

    Equal blocks of the ``transformer``, if ``forward`` runs it, are counted once.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS)
    starts = [(0, 1)]
    with torch.no_grad(), counter, Kernels(None, wide=False):
        with folded(transformer, lambda copies: starts.append((counter.get_total_flops(), copies))):
            forward()
        starts.append((counter.get_total_flops(), 1))
    return sum((end - start) * copies for (start, copies), (end, _) in pairwise(starts))


def held_by(
    forward: Callable[[], Tensor],
    transformer: nn.Module,
    *,
    rows: int = 0,
    backward: bool = False,
    autocast: torch.dtype | None = None,
    wide: bool = False,
) -> Held:
    """What ``forward``, on meta tensors of ``rows`` rows, holds; with ``backward``, also its backward pass.

    Equal blocks of the ``transformer``, if ``forward`` runs it, are counted once. ``rows`` is as
    :class:`Held` says, and ``autocast`` and ``wide`` are as :class:`Kernels` says. Gradients that exist
    before are not counted. Do not call this inside :func:`flops`, which keeps tensors alive.
    """
    with (
        torch.set_grad_enabled(backward),
        Held(rows) as held,
        Kernels(autocast, wide) as kernels,
        folded(transformer, held.mark),
    ):
        result = forward()
        held.mark(1, of_all=True)
        kernels.forget()
        held.mark(1)
        if backward:
            loss = result.square().mean()
            # torch.autograd.backward would disable Kernels while checkpointing recomputes a block
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
    return held
