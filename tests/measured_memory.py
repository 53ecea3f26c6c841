"""The memory that a short run of a recipe's only stage really takes: run as a program, prints bytes.

The C library is told to give freed memory back, so the resident peak is what was held at a time.
"""

import ctypes
import gc
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from posttrain.recipe.file import load_recipe
from posttrain.stages.chain import run
from posttrain.support.device import peak_memory, reset_peak_memory


def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def once(file, overrides, folder):
    with open("/dev/null", "w") as null:
        run(load_recipe(file, overrides), folder, Console(file=null))


if __name__ == "__main__":
    torch.set_num_threads(1)
    file, *overrides = sys.argv[1:]
    small = [*overrides, "stages.0.train.micro_batch=1"]
    with tempfile.TemporaryDirectory() as folder:
        once(file, small, Path(folder) / "warm")  # libraries and kernels are loaded here, and stay
        before = resident()
        reset_peak_memory(torch.device("cpu"))
        once(file, overrides, Path(folder) / "measured")
        print(peak_memory(torch.device("cpu")) - before)
