"""The memory that a short run of a recipe's only stage really takes.

A program that reads a recipe's file from each line of its input, runs it in a copy of itself and prints bytes.
The C library is told to give freed memory back, so the resident peak is what was held at a time.
"""

import ctypes
import gc
import multiprocessing
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
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


SMALL = [f"stages.0.train.{name}" for name in ("micro_batch=1", "batch_size=4", "steps=1")]


def once(file, overrides=()):
    with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w", encoding="utf-8") as null:
        run(load_recipe(file, overrides), Path(folder) / "run", Console(file=null))


def measure(file):
    once(file, SMALL)  # libraries and kernels are loaded here, and stay
    before = resident()
    reset_peak_memory(torch.device("cpu"))
    once(file)
    print(peak_memory(torch.device("cpu")) - before, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin):
        file = line.strip()
        if not number:
            once(file, SMALL)  # what is imported here need not be imported in each copy
        copy = multiprocessing.get_context("fork").Process(target=measure, args=(file,))
        copy.start()
        copy.join()
        if copy.exitcode:
            print("failed", flush=True)
