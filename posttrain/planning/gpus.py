"""Knows the memory and the peak throughput of GPUs, from data sheets or measured here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from posttrain.cache.settings import size_in_bytes
from posttrain.errors import PosttrainError
from posttrain.support.spelling import meant
from posttrain.support.wording import counted


@dataclass(frozen=True)
class Device:
    """A GPU, or a CPU, to plan for."""

    name: str
    memory_bytes: float
    flops: float
    """FLOP/s of dense bf16 matrix products with float32 sums."""
    tf32_flops: float
    """FLOP/s of float32 matrix products with TF32."""
    fp32_flops: float
    """FLOP/s of float32 matrix products without TF32."""
    source: str = "data sheet"
    """Where the figures come from: "data sheet", "given" or "measured"."""
    reserved: float = 0.05
    """Assumed fraction of the memory that the CUDA context and fragmentation take."""

    @property
    def usable_bytes(self) -> float:
        """The bytes that a stage may use."""
        return self.memory_bytes * (1 - self.reserved)


# Memory in GB; TFLOP/s of dense bf16 with float32 sums, and of float32. Figures with sparsity are halved.
# Checked in November 2026 against copies of the makers' tables:
# - NVIDIA's Blackwell table: HGX B200 has 180 GB, bf16 4,500 with sparsity, float32 75
# - NVIDIA's data sheets of H200 and H100 (bf16 1,979 SXM and 1,513 PCIe with sparsity), A100 (312), L40S
#   (362), A40 (149.7), and L4 (TF32 120 with sparsity; bf16 is twice TF32)
# - RTX A6000 and A10: float32 as sysrqmts.com lists it, bf16 4 times that, as on the A40's equal chip
# - GeForce: float32 sums halve the rate of tensor cores, so bf16 is twice float32: RTX 4090 as hmc-tech.com
#   lists both, RTX 3090 from float32, RTX 5090 from fp16's 838 with sparsity and fp16 sums
# - MI300X: bf16 1,300 and fp8 2,610 as rooflinenotes.dev lists them; float32 an eighth of bf16
_DATA_SHEETS: dict[str, tuple[float, float, float]] = {
    "B200 180GB": (180, 2250, 75),
    "H200 141GB": (141, 989, 67),
    "H100 80GB": (80, 989, 67),
    "H100 PCIe 80GB": (80, 756, 51),
    "A100 80GB": (80, 312, 19.5),
    "A100 40GB": (40, 312, 19.5),
    "L40S 48GB": (48, 362, 91.6),
    "A40 48GB": (48, 149.7, 37.4),
    "RTX A6000 48GB": (48, 154.8, 38.7),
    "A10 24GB": (24, 125, 31.2),
    "L4 24GB": (24, 121, 30.3),
    "RTX 5090 32GB": (32, 209.5, 104.8),
    "RTX 4090 24GB": (24, 165.2, 82.6),
    "RTX 3090 24GB": (24, 71, 35.6),
    "MI300X 192GB": (192, 1307, 163.4),
}


def gpu(name: str) -> Device:
    """The GPU called ``name``, in any usual spelling ("h100", "NVIDIA H100 80GB HBM3").

    Raises PosttrainError, with the known names, if none fits or several do."""
    plain = _plain(name)
    matches = [known for known in _DATA_SHEETS if _plain(known) == plain]
    if not matches:
        matches = [known for known in _DATA_SHEETS if _plain(known).startswith(plain) and "PCIe" not in known]
    if len(matches) != 1:
        several = f"may be one of {', '.join(map(repr, matches))}"
        why = several if matches else f"is not known{meant(name, _DATA_SHEETS)}"
        raise PosttrainError(
            f"--gpu: {name!r} {why}; known are {', '.join(_DATA_SHEETS)}. For another, give its memory and "
            "its dense bf16 throughput: --memory 48GB --tflops 362"
        )
    memory, flops, fp32 = _DATA_SHEETS[matches[0]]
    return Device(matches[0], memory * 1e9, flops * 1e12, flops / 2 * 1e12, fp32 * 1e12)


def custom(memory: str, tflops: float) -> Device:
    """A GPU of ``memory`` ("48GB", "24 GiB", or a number of GB) and dense bf16 ``tflops``.

    Float32 without TF32 is assumed to be a tenth as fast. Raises PosttrainError if ``memory`` is not a
    size."""
    name = memory.strip()
    name += " GB" if name[-1:].isdigit() else ""
    try:
        size = size_in_bytes(name)
    except ValueError as error:
        raise PosttrainError(f"--memory: {error}") from error
    flops = tflops * 1e12
    return Device(name, size, flops, flops / 2, flops / 10, "given")


def here() -> Device:
    """This machine's CUDA device, or its CPU if it has none, with measured throughput."""
    import torch

    from posttrain.planning.throughput import matrix_flops

    if torch.cuda.is_available():
        device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(device)
        low, full = (matrix_flops(device, dtype) for dtype in (torch.bfloat16, torch.float32))
        return Device(properties.name, properties.total_memory, low, low / 2, full, "measured")
    flops = matrix_flops(torch.device("cpu"), torch.float32)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(
        counted(torch.get_num_threads(), "CPU thread"), memory, flops, flops, flops, "measured", 0.1
    )


def _plain(name: str) -> str:
    model = re.sub(r"nvidia|geforce|amd|instinct|tensor core|sxm\d?|hbm\d?e?|gpu", "", name.lower())
    return "".join(c for c in model if c.isalnum())
