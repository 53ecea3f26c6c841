"""Gradient checkpointing: the backward recomputes activations instead of keeping them in memory."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from torch import nn

Checkpointing = Literal["off", "selective", "full"] | float
"""What the backward recomputes. A number is the share of activations, more than 0 and less than 1, that
compiled blocks keep."""
SELECTIVE = 0.5
"""The share that compiled blocks keep under ``selective``."""

_aten: Any = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}
"""Operations whose results ``selective`` keeps. They hold nearly all FLOPs of a transformer block."""


def share_kept(mode: Checkpointing) -> float:
    """The share of activations, up to 1, that compiled blocks keep in that mode. ``full`` keeps all that a
    block makes while the block itself is computed again."""
    if isinstance(mode, str):
        return SELECTIVE if mode == "selective" else 1.0
    return mode


def checkpoint_blocks(transformer: Any, mode: Checkpointing) -> None:
    """Let the backward through each block of a diffusers ``transformer`` recompute its activations.

    ``full`` keeps a block's inputs only and costs one more forward (Chen et al. 2016, arXiv:1604.06174).
    ``selective`` also keeps the results of matrix products and attention, and recomputes normalisation,
    activation functions and modulation. ``off`` keeps everything. Results are bitwise the same. A number acts
    as ``selective``, for blocks that are not compiled.
    """
    if mode == "off":
        transformer.disable_gradient_checkpointing()
        return
    options: dict[str, Any] = {"context_fn": _contexts} if mode != "full" else {}

    def recomputed(block: nn.Module, *inputs: Any) -> Any:
        # blocks draw no random numbers, so no generator state must be restored
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    transformer.enable_gradient_checkpointing(recomputed)


def _keep_or_recompute(_context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _keep_or_recompute)
