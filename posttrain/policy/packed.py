"""Keeps the frozen weights of a transformer's linear layers in 8 or 4 bits, in bitsandbytes' formats.

A layer computes with its weights unpacked to the precision of its input, and forgets them at once: they are
unpacked again in the backward. So a forward is the same to the bit with and without gradients, and no sample
depends on the others of its micro-batch, which bitsandbytes' own layers do not promise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.errors import InstallError
from posttrain.policy.blocks import blocks

Packing = Literal["int8", "nf4"]
"""``int8``: 8 bits and a float32 scale for each output (Dettmers et al. 2022, arXiv:2208.07339, section 2.1).
``nf4``: 4-bit NormalFloat and a float32 scale for each 64 numbers (Dettmers et al. 2023, arXiv:2305.14314).
"""
BLOCK = 64
"""Numbers of ``nf4`` that share a scale."""
_IN_BLOCK = re.compile(r"\w+\.\d+\..*weight")
"""The names of weights in a transformer's repeated blocks."""


def problem(packing: Packing | None) -> str | None:
    """Why weights cannot be packed on this machine; None if they can."""
    if packing is not None and find_spec("bitsandbytes") is None:
        return f"{packing} needs bitsandbytes, which is not installed: pip install 'posttrain[8bit]'"
    return None


def pack(transformer: nn.Module, packing: Packing) -> None:
    """Pack the weights of the linear layers in the repeated blocks of ``transformer``, adapters left out.

    The layers outside the blocks (embeddings, the last projection) are few and decide much, so they stay as
    they are. Raises InstallError without bitsandbytes, except on the meta device.
    """
    for block in blocks(transformer):
        for name, module in list(block.named_modules()):
            if ".lora_" in name:
                continue
            for child, layer in list(module.named_children()):
                if type(layer) is nn.Linear and not child.startswith("lora_"):
                    setattr(module, child, PackedLinear(layer, packing))


def packed_bytes(shape: tuple[int, ...], packing: Packing) -> int:
    """Bytes of a packed weight (out, in) and its scales."""
    numbers = math.prod(shape)
    if packing == "int8":
        return numbers + 4 * shape[0]
    return -(-numbers // 2) + 4 * -(-numbers // BLOCK)


def is_packed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether :func:`pack` packs the weight of that name and shape."""
    return len(shape) == 2 and _IN_BLOCK.fullmatch(name) is not None


def frozen_bytes(shapes: Mapping[str, tuple[int, ...]], itemsize: int, packing: Packing | None) -> int:
    """Bytes of a transformer's frozen weights, of ``itemsize`` bytes a number where they are not packed."""
    return sum(
        packed_bytes(shape, packing)
        if packing is not None and is_packed(name, shape)
        else math.prod(shape) * itemsize
        for name, shape in shapes.items()
    )


def scale_bytes(transformer: nn.Module) -> int:
    """Bytes of the scales of packed weights, which are no parameters."""
    return sum(module.scale.nbytes for module in transformer.modules() if isinstance(module, PackedLinear))


class PackedLinear(nn.Linear):
    """A frozen linear layer with a packed weight: ``weight`` has the packed numbers, ``scale`` the scales."""

    scale: Tensor

    def __init__(self, layer: nn.Linear, packing: Packing) -> None:
        """Pack the weight of ``layer``, which is left as it was."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packing: Packing = packing
        numbers, scale = _packed(layer.weight.detach(), packing)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        # no parameter, because frozen parameters are rounded to the precision of the forwards
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        return _Product.apply(input, self.weight, self.scale, self.bias, self.packing, shape)  # type: ignore[no-any-return]

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that the layer computes with."""
        return _unpacked(self.weight, self.scale, self.packing, (self.out_features, self.in_features), dtype)


class _Product(torch.autograd.Function):
    """input @ weight^T + bias, with gradients of the input alone. No unpacked weight is kept between."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        numbers: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        packing: Packing,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(numbers, scale)
        ctx.packing, ctx.shape = packing, shape
        return nn.functional.linear(input, _unpacked(numbers, scale, packing, shape, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        numbers, scale = ctx.saved_tensors
        weight = _unpacked(numbers, scale, ctx.packing, ctx.shape, gradient.dtype)
        return gradient @ weight, None, None, None, None, None


def _packed(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """The packed numbers of ``weight`` (out, in), and the scales in float32."""
    rows, numbers = weight.shape[0], weight.numel()
    if weight.is_meta:  # a plan counts on machines that have no bitsandbytes
        if packing == "int8":
            return torch.empty_like(weight, dtype=torch.int8), torch.empty(rows, device="meta")
        half = torch.empty(-(-numbers // 2), 1, dtype=torch.uint8, device="meta")
        return half, torch.empty(-(-numbers // BLOCK), device="meta")
    if (reason := problem(packing)) is not None:
        raise InstallError(reason)
    from bitsandbytes import functional

    if packing == "int8":
        whole, scale, _ = functional.int8_vectorwise_quant(weight.half())
        return whole, scale.float() / 127
    half, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return half, state.absmax.float()


def _unpacked(
    numbers: Tensor, scale: Tensor, packing: Packing, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    if packing == "int8":
        # multiplied in float32 and rounded once, in place
        return numbers.to(dtype).mul_(scale[:, None])
    if numbers.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    # as one row: the CPU's kernel takes wrong scales for rows that end inside a block of numbers
    flat = torch.ops.bitsandbytes.dequantize_4bit(numbers, scale, BLOCK, "nf4", (1, math.prod(shape)), dtype)
    return flat.view(shape)
