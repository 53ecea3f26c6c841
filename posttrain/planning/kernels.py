"""Imitates autocast and attention kernels on the meta device, which has neither.

Matrix products are in low precision, with a copy of each weight kept until the outermost forward ends;
normalisation is in float32, as on CUDA; and attention does not store its matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_MATRIX = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__}
_WIDE = {F.layer_norm, F.group_norm, F.softmax, torch.softmax}


class Kernels(TorchFunctionMode):
    """Imitates a device's ``autocast`` (None for float32) and attention inside the ``with`` block.

    ``wide`` keeps in float32 what autocast keeps in float32 on CUDA.
    """

    def __init__(self, autocast: torch.dtype | None, wide: bool) -> None:
        super().__init__()
        self.autocast, self.wide = autocast, wide
        self._copies: dict[int, Tensor] | None = {}

    def forget(self) -> None:
        """Drop the copies of the weights, as autocast does when the forward ends, and keep none during the
        backward pass."""
        self._copies = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if self.autocast is not None and func in _MATRIX:
            args = tuple(self._low(a) for a in args)
            kwargs = {name: self._low(value) for name, value in kwargs.items()}
        elif self.autocast is not None and self.wide and func in _WIDE:
            args = tuple(a.float() if _is_float(a) else a for a in args)
        return func(*args, **kwargs)

    def _low(self, value: Any) -> Any:
        if not _is_float(value) or value.dtype == self.autocast:
            return value
        if self._copies is None or not (isinstance(value, torch.nn.Parameter) and value.requires_grad):
            return value.to(self.autocast)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(self.autocast)
        return self._copies[id(value)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        if self.autocast is not None:
            query, key, value = (t.to(self.autocast) for t in (query, key, value))
        mask = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask
        return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
