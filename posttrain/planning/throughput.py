"""Measures how fast a device multiplies matrices."""

from __future__ import annotations

import time

import torch

from posttrain.support.device import synchronize

SHAPES = {"cuda": [(8192, 8192, 8192), (8192, 1536, 6144), (8192, 6144, 1536)], "cpu": [(1024, 1024, 1024)]}
"""(rows, inner width, outer width): a large square, and the feed-forward layers of SD3.5 Medium."""


def matrix_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest of a few products of ``dtype`` matrices, each repeated for about ``seconds``.

    This is "100 % MFU" if no data sheet is used. Float32 is measured with TF32 if TF32 is on.
    """
    return max(_product(device, dtype, shape, seconds) for shape in SHAPES.get(device.type, SHAPES["cpu"]))


def _product(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float) -> float:
    rows, inner, outer = shape
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(inner, outer, device=device, dtype=dtype)

    def timed(count: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            torch.matmul(a, b)
        synchronize(device)
        return time.perf_counter() - start

    timed(2)  # the first product also chooses a kernel
    count = max(1, int(seconds / max(timed(1), 1e-6) / 3))
    return 2 * rows * inner * outer * count / min(timed(count) for _ in range(3))
