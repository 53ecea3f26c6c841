"""Knows the memory and the peak throughput of GPUs, from data sheets or measured here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from posttrain.cache.settings import size_in_bytes
from posttrain.errors import PosttrainError
from posttrain.planning.rates import Precision
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
    bf16: bool = True
    """Whether it multiplies in bf16 and TF32. Without, it computes both as float32, so ``flops`` and
    ``tf32_flops`` are float32's."""

    @property
    def usable_bytes(self) -> float:
        """The bytes that a stage may use."""
        return self.memory_bytes * (1 - self.reserved)

    def peak(self, precision: Precision) -> float:
        """FLOP/s of matrix products in ``precision``."""
        return {"bf16": self.flops, "tf32": self.tf32_flops, "fp32": self.fp32_flops}[precision]

    def has(self, precision: Precision) -> bool:
        """Whether it has units for ``precision``, so that a rate measured in it can be scaled to it."""
        return self.bf16 or precision == "fp32"


# Memory in GB; TFLOP/s of dense bf16 with float32 sums, and of float32. Figures with sparsity are halved.
# Checked in November 2026 against copies of the makers' tables:
# - NVIDIA's Blackwell table: HGX B200 has 180 GB, bf16 4,500 with sparsity, float32 75
# - NVIDIA's data sheets of H200 and H100 (bf16 1,979 SXM and 1,513 PCIe with sparsity), A100 (312), L40S
#   (362), A40 (149.7), and L4 (TF32 120 with sparsity; bf16 is twice TF32)
# - RTX A6000 and A10: float32 as sysrqmts.com lists it, bf16 4 times that, as on the A40's equal chip
# - GeForce: float32 sums halve the rate of tensor cores, so bf16 is twice float32: RTX 4090 as hmc-tech.com
#   lists both, RTX 3090 from float32, RTX 5090 from fp16's 838 with sparsity and fp16 sums
# - GeForce of 8 to 16 GB: float32 of RTX 4060 and 3060 as hmc-tech.com lists it, of RTX 4080 and 4070 Ti as
#   huggingface.co/datasets/ohdoking/gpu_spec does; of RTX 4070, 5080, 5070 Ti and 5060 Ti from cores x 2 x
#   boost clock, as thefpsreview.com (5,888 at 2,475 MHz), tweaktown.com (10,752 at 2.62 GHz, 8,960 at 2.45)
#   and cputronic.com (4,608 at 2,572 MHz) list them. bf16 is twice float32, as on the larger ones
# - RTX A4000: NVIDIA's 19.2 for float32 and 153.4 for tensor cores with sparsity
# - V100 SXM2 (float32 15.7) and T4 (8.1) have tensor cores for fp16 alone: see _WITHOUT_BF16
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
    "RTX 5080 16GB": (16, 112.7, 56.3),
    "RTX 5070 Ti 16GB": (16, 87.8, 43.9),
    "RTX 5060 Ti 16GB": (16, 47.4, 23.7),
    "RTX 4080 16GB": (16, 97.5, 48.7),
    "RTX 4070 Ti 12GB": (12, 80.2, 40.1),
    "RTX 4070 12GB": (12, 58.3, 29.1),
    "RTX 4060 8GB": (8, 30.2, 15.1),
    "RTX 3060 12GB": (12, 25.5, 12.7),
    "RTX A4000 16GB": (16, 76.7, 19.2),
    "V100 32GB": (32, 15.7, 15.7),
    "V100 16GB": (16, 15.7, 15.7),
    "T4 16GB": (16, 8.1, 8.1),
    "MI300X 192GB": (192, 1307, 163.4),
}
# Volta and Turing compute bf16 and TF32 as float32 (or emulate bf16, which is slower still).
_WITHOUT_BF16 = {"V100 32GB", "V100 16GB", "T4 16GB"}


def gpu(name: str) -> Device:
    """The GPU called ``name``, in any usual spelling ("h100", "NVIDIA H100 80GB HBM3").

    Raises PosttrainError, with the known names, if none fits or several do."""
    plain = _plain(name)
    matches = [known for known in _DATA_SHEETS if _plain(known) == plain]
    if not matches:  # "L4" is no "L40S 48GB", and "RTX 4070" no "RTX 4070 Ti 12GB"
        matches = [known for known in _DATA_SHEETS if _plain(known.rpartition(" ")[0]) == plain]
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
    bf16 = matches[0] not in _WITHOUT_BF16
    tf32 = flops / 2 if bf16 else fp32
    return Device(matches[0], memory * 1e9, flops * 1e12, tf32 * 1e12, fp32 * 1e12, bf16=bf16)


def known_name(name: str) -> str:
    """The name by which the data sheets know the GPU ``name``; ``name`` itself if they do not."""
    plain = _plain(name)
    return next((known for known in _DATA_SHEETS if _plain(known) == plain), name)


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
