"""Entries of a session on one GPU: each is tried alone, told in one line of JSON, and its memory freed.

What fails is told too, and the session goes on; what no longer fits into the time is left out, and told.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posttrain.engine.compiling import OPTIONS
from posttrain.policy.out_of_memory import is_out_of_memory
from posttrain.support.device import synchronize


def command_line(title: str) -> argparse.Namespace:
    """The options that the parts of ``gpu.sh`` share."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--tiny", action="store_true", help="the tiny model on the CPU, to try the script")
    parser.add_argument("--seconds", type=float, default=240.0, help="no entry is begun that would end later")
    parser.add_argument("--only", default="", help="names of entries, or their beginnings, with commas")
    options = parser.parse_args()
    options.only = [name for name in options.only.split(",") if name]
    return options


@dataclass
class Session:
    """The clock, the file and the device of one process."""

    options: argparse.Namespace
    source: str
    """Which script measures."""
    device: torch.device = field(init=False)
    rate: float = 0.0
    """FLOP/s of a large bf16 product, which every MFU divides by; 0 where it was not measured."""
    started: float = field(default_factory=time.perf_counter)
    limit: float = field(init=False)
    """Seconds after which no entry may end."""

    def __post_init__(self) -> None:
        from torch._dynamo import config

        self.limit = self.options.seconds
        self.device = torch.device("cpu" if self.options.tiny else "cuda")
        config.cache_size_limit = max(config.cache_size_limit, 256)
        # torch counts recompilations of one code over all its variants, too
        config.accumulated_cache_size_limit = max(config.accumulated_cache_size_limit, 1024)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if self.options.tiny:
            torch.set_num_threads(1)
            OPTIONS["backend"] = os.environ.get("TINY_BACKEND", "aot_eager")
        folder = Path(os.environ.get("OUT", "runs/gpu"))
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "gpu.jsonl").open("a", encoding="utf-8")

    def say(self, entry: str, **figures: Any) -> None:
        """One line of JSON, printed and kept."""
        kept = {name: _rounded(value) for name, value in figures.items() if value is not None}
        line = json.dumps(
            {"source": self.source, "entry": entry, **kept, "at": round(self.passed)}, default=str
        )
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.started

    def wants(self, name: str) -> bool:
        """Whether the command line asks for this entry."""
        only = self.options.only
        return not only or any(name.startswith(begin) for begin in only)

    def wants_some(self, beginnings: Iterable[str]) -> bool:
        """Whether the command line asks for an entry whose name begins so."""
        only = self.options.only
        return not only or any(begin.startswith(start) for start in beginnings for begin in only)

    def entry(
        self, name: str, cost: float, work: Callable[[], dict[str, Any]], *, cuda: bool = False
    ) -> bool:
        """Do ``work`` and tell what it returns; ``cost`` is the seconds that it takes on an H100.

        ``cuda``: it means nothing elsewhere, and is left out. Returns whether it was done.
        """
        if not self.wants(name):
            return False
        if cuda and self.device.type != "cuda":
            self.say(name, skipped="needs a CUDA device")
            return False
        if not self.options.tiny and self.passed + cost > self.limit:
            self.say(name, skipped=f"{cost:.0f} s are more than what is left of {self.limit:.0f} s")
            return False
        start = time.perf_counter()
        try:
            self.say(name, **work(), took=time.perf_counter() - start)
            return True
        except Exception as error:  # whatever it is, the other entries are to be measured
            kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
            self.say(name, error=f"{kind}: {' '.join(str(error).split())[:400]}")
            return False
        finally:
            self.free()

    def free(self) -> None:
        """Give back what the entry before held."""
        torch.clear_autocast_cache()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure_rate(self) -> None:
        """FLOP/s of an 8192 x 8192 x 8192 bf16 product; 1024 on a CPU."""
        side, repeats = (8192, 20) if self.device.type == "cuda" else (1024, 2)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(2):
            a @ b
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(self.device)
        self.rate = 2 * side**3 * repeats / (time.perf_counter() - start)

    def timed(
        self, step: Callable[[], object], samples: int, work: float = 0.0, rounds: int = 2, settle: int = 1
    ) -> dict[str, Any]:
        """Best of ``rounds`` calls after the first one and ``settle`` more.

        ``samples`` are made by one call, each of ``work`` FLOP, or 0 where nobody counted.
        """
        cuda = self.device.type == "cuda"

        def once() -> float:
            synchronize(self.device)
            start = time.perf_counter()
            step()
            synchronize(self.device)
            return time.perf_counter() - start

        first = once()
        if self.options.tiny:
            rounds, settle = 1, 0
        for _ in range(settle):
            once()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = min(once() for _ in range(rounds))
        return {
            "samples_per_second": samples / seconds,
            "seconds": seconds,
            "mfu": work * samples / seconds / self.rate if self.rate and work else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
            "first": first,
        }


def halved(work: Callable[[int], dict[str, Any]], rows: int, session: Session) -> dict[str, Any]:
    """What ``work`` returns with ``rows`` at a time, or half as many until they fit, and that number."""
    while True:
        try:
            return {"micro_batch": rows, **work(rows)}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        rows //= 2  # out here the error has gone, and the memory that it held
        session.free()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items() if inner is not None}
    return float(f"{value:.4g}") if isinstance(value, float) else value
