"""Chooses the device of a run and measures the memory on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from posttrain.errors import RecipeError

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container's limits."""


def resolve(name: str) -> torch.device:
    """The torch device for a recipe's ``device``. ``auto`` prefers CUDA, then MPS, then the CPU.

    Raises RecipeError if this machine has no such device.
    """
    if not torch.cuda.is_available():
        # else DeepSpeed, if installed, warns that it guesses the accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if name == "auto":
        if torch.cuda.is_available():
            return _gpu_of_this_process()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):  # torch knows more, such as 'meta'
            raise RuntimeError(name)
    except RuntimeError as error:
        raise RecipeError(f"device: no {name!r}: one of 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'") from error
    if device == torch.device("cuda"):
        device = _gpu_of_this_process()
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"device: no {name!r} here; torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RecipeError("device: 'mps' is not available here")
    return device


def _gpu_of_this_process() -> torch.device:
    """The GPU of this process's number on its machine. Where it sees fewer, their numbers start again."""
    count = torch.cuda.device_count()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(count, 1))


def set_tf32(enabled: bool) -> None:
    """Switch TF32 on or off for float32 matrix products and convolutions on CUDA."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def bf16_problem(device: torch.device) -> str | None:
    """Why bf16 is slow on the device; None if it has units for it, or is no CUDA device."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has no units for bf16, which is computed slowly: precision fp32 is faster there"


def reset_peak_memory(device: torch.device) -> None:
    """Restart the measurement of :func:`peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text(
                "5", encoding="utf-8"
            )  # this resets VmHWM, the resident peak
        except OSError:
            return  # some containers forbid it; the peak is then that of the whole process so far


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the last reset: on the CUDA device, else in this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on the device; None if the system does not tell."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if sys.platform != "linux":
        return None
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:  # a container's limit may be lower than the machine's memory
        limit, used, parts = (
            (CGROUP / f"memory.{name}").read_text("utf-8") for name in ("max", "current", "stat")
        )
        # what is used includes files that were read or written, which the system gives up when it needs room
        files = next(int(line.split()[1]) for line in parts.splitlines() if line.startswith("inactive_file "))
        return min(free, int(limit) - int(used) + files)
    except (OSError, ValueError, StopIteration):
        return free


def free_memory(device: torch.device) -> None:
    """Return the allocator's unused cached memory to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
