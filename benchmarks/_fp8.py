"""Linear layers whose three matrix products are fp8 with one scale a tensor, to see what they could bring.

Forward in e4m3, gradients in e5m2, as Micikevicius et al. 2022 (arXiv:2209.05433) propose; scales from the
tensor at hand. An experiment: no training uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def lowered(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` in fp8, its largest number at the largest of ``dtype``, and what to multiply by to come back."""
    most = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / most
    return (x.float() / scale).clamp(-most, most).to(dtype), scale


def product(a: Tensor, b: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> Tensor:
    """``a`` (m, k) times ``b`` (n, k) transposed, in bf16; m, n and k are multiples of 16."""
    (a8, scale_a), (b8, scale_b) = lowered(a, dtypes[0]), lowered(b, dtypes[1])
    return torch._scaled_mm(
        a8.contiguous(),
        b8.contiguous().t(),
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, (E4M3, E4M3))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        back = product(gradient, weight.t(), (E5M2, E4M3))
        return back, product(gradient.t(), x.t(), (E5M2, E4M3))


class Fp8Linear(nn.Module):
    """A linear layer with the weights of another one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def swap(block: nn.Module) -> int:
    """Make the linear layers of ``block`` fp8, those of its modulation aside. Returns how many there were."""
    count = 0
    for name, module in list(block.named_modules()):
        if not isinstance(module, nn.Linear) or "norm" in name:
            continue
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, Fp8Linear(module))
        count += 1
    return count
