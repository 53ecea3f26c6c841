"""On which device does a run live, and how much memory did it need there?"""

from __future__ import annotations

import logging
import os
import resource
import sys
from pathlib import Path

import torch

from posttrain.errors import RecipeError


def resolve(name: str) -> torch.device:
    """The torch device that a recipe's ``device`` means; ``auto`` prefers CUDA, then MPS, then the CPU.

    Raises RecipeError where this machine has no such device.
    """
    if not torch.cuda.is_available():
        # or DeepSpeed, where it is installed, warns that it had to guess
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # and bitsandbytes, which peft imports where it is installed, of a 4-bit product that it lacks
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device: no {name!r} here; torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("device: 'mps' is not available here")
    return device


def set_tf32(enabled: bool) -> None:
    """Let CUDA multiply float32 matrices in TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring anew; see :func:`peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the resident peak
        except OSError:
            return  # not allowed in some containers: the peak is then the process's so far


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since the last reset: of the CUDA device, else of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
