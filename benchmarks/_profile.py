"""Splits a step's time on the device by kind of kernel, and names the dearest kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from posttrain.support.device import synchronize

KINDS = {
    "attention": r"flash|attention|fmha|sdpa|cudnn_generated",
    "matrix products": r"gemm|nvjet|cutlass|xmma|scaled_mm|\bmm\b|addmm|bmm",
    "optimizer": r"adam|lpnorm|multi_tensor",
    "copies and casts": r"copy|memcpy|memset|_to_copy",
    "compiled": r"triton",
    "convolutions": r"conv|implicit",
    "norms and reductions": r"norm|reduce|softmax",
    "joining": r"\bcat\b|catarray",
    "elementwise": r"elementwise|\badd|\bmul|silu|gelu",
}
"""Kind -> what the names of its kernels contain; the first that fits counts."""


def kernels(step: Callable[[], object], device: torch.device, file: Path, most: int = 25) -> dict[str, Any]:
    """Milliseconds of kernels in one ``step``, and of the whole, by kind; the dearest go into ``file``."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    step()
    synchronize(device)
    with profile(activities=activities) as profiled:
        step()
        synchronize(device)
    found: list[tuple[float, int, str]] = []
    launches = 0
    for event in profiled.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        on_device = str(event.device_type).endswith("CUDA")
        launches += event.count if "LaunchKernel" in event.key else 0
        if spent and on_device == cuda:
            found.append((spent / 1e3, event.count, event.key))
    found.sort(reverse=True)
    total = sum(spent for spent, _, _ in found)
    shares: dict[str, float] = {}
    for spent, _, name in found:
        kind = _kind(name)
        shares[kind] = shares.get(kind, 0.0) + spent / total
    lines = [f"{spent:10.2f} ms {count:7d}  {name[:150]}" for spent, count, name in found[:most]]
    with file.open("a", encoding="utf-8") as text:
        text.write(f"{file.stem}: {total:.1f} ms of kernels\n" + "\n".join(lines) + "\n\n")
    ordered = sorted(shares.items(), key=lambda share: -share[1])
    return {
        "kernel_ms": total,
        "kernels": sum(count for _, count, _ in found),
        "launches": launches,
        "shares": {kind: round(share, 3) for kind, share in ordered},
        "dearest": [f"{spent:.1f} ms {count} {name[:60]}" for spent, count, name in found[:6]],
    }


def _kind(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if re.search(words, name.lower())), "other")
