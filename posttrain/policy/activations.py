"""Which activations of a forward does its backward compute again, to save their memory?"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from torch import nn

Checkpointing = Literal["off", "selective", "full"]

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
"""What ``selective`` keeps: nearly all FLOPs of a transformer block are in these."""


def checkpoint_blocks(transformer: Any, mode: Checkpointing) -> None:
    """Let the backward through each block of a diffusers ``transformer`` compute activations again.

    ``full`` keeps a block's inputs alone, and costs a forward more (Chen et al. 2016, arXiv:1604.06174);
    ``selective`` keeps what matrix products and attention return as well, and computes normalisation,
    activation functions and modulation again. The numbers stay what they are.
    """
    if mode == "off":
        transformer.disable_gradient_checkpointing()
        return
    options: dict[str, Any] = {"context_fn": _contexts} if mode == "selective" else {}

    def again(block: nn.Module, *inputs: Any) -> Any:
        # a block draws nothing, so there is no state of random numbers to put back
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    transformer.enable_gradient_checkpointing(again)


def _policy(_context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
