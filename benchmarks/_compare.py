"""Measures two implementations side by side: samples per second, bytes at the peak, and MFU.

MFU is the model's FLOPs (a forward-backward counts 3 forwards, what checkpointing computes again counts
nothing) over the time, over the measured throughput of matrix products.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _bench import Bench
from _model import forward_flops

from posttrain.engine.compiling import OPTIONS
from posttrain.planning.held import Held
from posttrain.planning.throughput import matrix_flops
from posttrain.policy.activations import checkpoint_blocks
from posttrain.policy.blocks import blocks
from posttrain.support.device import synchronize
from posttrain.support.wording import short


def compare(
    it: Bench,
    engine: Callable[[], object],
    straightforward: Callable[[], object],
    samples: int,
    forward_equivalents: float,
) -> None:
    """Run both alternately, print what they cost, and write ``--output``.

    ``samples`` are made by one call, each of ``forward_equivalents`` of the transformer.
    """
    steps = {"engine": engine, "straightforward": straightforward}
    times: dict[str, list[float]] = {name: [] for name in steps}
    # on a CPU what counts the bytes keeps compiled code from running, so they are counted without
    steps["engine"] = as_set(it, engine, compiling=it.device.type == "cuda")
    peaks = {name: peak(it, step) for name, step in steps.items()}  # which warms up, too
    steps["engine"] = as_set(it, engine)
    steps["engine"]()
    for _ in range(it.options.rounds):
        for name, step in steps.items():
            synchronize(it.device)
            start = time.perf_counter()
            step()
            synchronize(it.device)
            times[name].append(time.perf_counter() - start)
    rate = matrix_flops(it.device, it.autocast or torch.float32)
    work = forward_flops(it) * forward_equivalents * samples
    found: dict[str, Any] = {
        name: {
            "samples_per_second": samples / statistics.median(times[name]),
            "peak_bytes": peaks[name],
            "mfu": work / statistics.median(times[name]) / rate,
        }
        for name in steps
    }
    ratio = statistics.median(b / a for a, b in zip(times["engine"], times["straightforward"], strict=True))
    chosen = it.options
    print(f"{chosen.model} at {chosen.resolution} px, {samples} samples, {chosen.precision}, {_name(it)}")
    print(f"{work / samples:.4g} FLOP a sample; matrix products: {short(rate, 'FLOP/s')}")
    for name, figures in found.items():
        peaked = f"{short(figures['peak_bytes'], 'B'):>8} at the peak"
        print(
            f"{name:16} {figures['samples_per_second']:10.3f} samples/s   {peaked}   MFU {figures['mfu']:.0%}"
        )
    print(f"the engine is {ratio:.2f} times as fast (median of {it.options.rounds} pairs)")
    print(f"the engine's time: {_shares(it, steps['engine'])}")
    if it.options.output is not None:
        about = {"device": _name(it), "matrix_flops": rate, "ratio": ratio, "seconds": it.seconds}
        it.options.output.write_text(json.dumps({**found, **about}, indent=2, default=str), "utf-8")


def as_set(it: Bench, step: Callable[[], object], *, compiling: bool = True) -> Callable[[], None]:
    """``step`` with the blocks checkpointed and compiled as the command line says; afterwards they are as
    the straightforward implementation finds them."""
    parts = blocks(it.model.transformer) if it.options.compile and compiling else []

    def run() -> None:
        checkpoint_blocks(it.model.transformer, it.options.checkpointing)
        for block in parts:
            block.compile(**OPTIONS)
        step()
        for block in parts:
            block._compiled_call_impl = None
        checkpoint_blocks(it.model.transformer, "off")

    return run


def _shares(it: Bench, step: Callable[[], object]) -> str:
    it.seconds = {}
    start = time.perf_counter()
    step()
    synchronize(it.device)
    total = time.perf_counter() - start
    it.seconds["waiting and other"] = max(total - sum(it.seconds.values()), 0.0)
    return ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in it.seconds.items())


def peak(it: Bench, step: Callable[[], object]) -> int:
    """Bytes at the peak of the second of two calls, weights and optimizer not counted."""
    step()
    if it.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(it.device)
        before = torch.cuda.memory_allocated(it.device)
        step()
        return torch.cuda.max_memory_allocated(it.device) - before
    with Held() as held:
        step()
    return held.peak()


def _name(it: Bench) -> str:
    return torch.cuda.get_device_name(it.device) if it.device.type == "cuda" else "1 CPU thread"
