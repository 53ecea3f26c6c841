"""Counts the FLOPs and peak bytes of a computation on torch's meta device.

The model's own code runs on tensors without content, so nothing is computed; allocations and multiplications
are added up. The meta device has neither autocast nor attention kernels, so both are imitated: matrix
products in low precision, with a copy of each weight kept until the outermost forward ends; normalisation in
float32, as on CUDA; and attention that does not store its matrix.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_ATTENTION: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_FLOPS: dict[Any, Any] = {_ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
_MATRIX = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__}
_WIDE = {F.layer_norm, F.group_norm, F.softmax, torch.softmax}


def flops(forward: Callable[[], object]) -> int:
    """FLOPs of ``forward`` on meta tensors, without gradients; a multiply-add counts 2."""
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOPS)
    with torch.no_grad(), counter, Kernels(None, wide=False):
        forward()
    return counter.get_total_flops()


def peak_bytes(
    forward: Callable[[], Tensor],
    *,
    backward: bool = False,
    autocast: torch.dtype | None = None,
    wide: bool = False,
) -> int:
    """The most bytes that ``forward``, on meta tensors, holds at a time; with ``backward``, also its backward
    pass.

    ``wide`` keeps in float32 what autocast keeps in float32 on CUDA. Gradients that exist before are not
    counted. Do not call this inside :func:`flops`, which keeps tensors alive.
    """
    with torch.set_grad_enabled(backward), Held() as held, Kernels(autocast, wide) as kernels:
        result = forward()
        kernels.forget()
        if backward:
            loss = result.square().mean()
            # torch.autograd.backward would disable Kernels while checkpointing recomputes a block
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
    return held.peak


class Held(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside the block and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in before or key in self._alive:
                continue
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class Kernels(TorchFunctionMode):
    """Imitates a device's autocast and attention, as the module's docstring says."""

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
        return _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
