"""Measures what the cache saves of an SFT and a SOAR step, and what filling it costs.

    python benchmarks/cache_step.py [--batch 32] [--rounds 7]

The shipped tiny-sd3 on Shapes images, one thread, in seconds of this process's CPU time, which neighbours on
the machine hardly change. Medians of alternating rounds. Exits with 1 where a cached batch differs.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from posttrain.algorithm import Algorithm, Batch, Tools
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR
from posttrain.data.family import Opening
from posttrain.distributed.world import ALONE
from posttrain.engine.trainer import update
from posttrain.models import _diffusers_flow
from posttrain.models.sd3 import SD3
from posttrain.optim.settings import Train
from posttrain.parallel.single import Single
from posttrain.policy import Policy
from posttrain.recipe.file import parse_recipe
from posttrain.stages.caches import fill_for_stage
from posttrain.support.randomness import Draws

IMAGES = 128
CACHES = {"none": "{}", "prompts": "{prompts: true}", "both": "{prompts: true, latents: mean_logvar}"}
RECIPE = """
name: cache-step
device: cpu
model: {type: sd3, path: posttrain/tiny-sd3, max_sequence_length: 16}
stages:
  - name: s
    algorithm: {type: sft}
    data: {type: shapes, images: %d, seed: 1}
    train: {steps: 1, batch_size: %d, sample_every: null}
"""


def batches(model: Any, cache: str, batch: int, work: Path) -> Iterator[tuple[int, Batch, Draws]]:
    """The batches of a stage with that cache, which is filled; the time is printed."""
    made = parse_recipe(RECIPE % (IMAGES, batch), "cache_step.yaml", [f"cache={cache}"])
    made = made.model_copy(update={"cache": made.cache.model_copy(update={"path": work / "cache"})})
    source = made.stages[0].data.open(Opening(model, work, made.stages[0].train.batch_size))
    start = time.process_time()
    fill_for_stage(made, made.stages[0], model, source, Console(quiet=True))
    print(f"filling, {cache}: {time.process_time() - start:.2f} s")
    yield from source.batches((0, 0), 0)


class Clock:
    """Measures calls by name, in seconds of this process's CPU time."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        self.times.setdefault(name, []).append(time.process_time() - start)
        return result

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.times.items()}


def equal(one: Batch, other: Batch) -> bool:
    """Whether two batches have the same latents and conditions, to the bit."""
    return torch.equal(one.latents, other.latents) and all(
        torch.equal(tensor, other.conditions.table[key]) for key, tensor in one.conditions.table.items()
    )


def time_encoders(model: Any, prompts: int, images: int, clock: Clock) -> None:
    """Time what a step without a cache encodes, in the engine's portions and all at once."""
    words, pixels = [""] * prompts, torch.rand(images, 3, 64, 64) * 2 - 1
    clock("encode prompts, 8 at once", lambda: model.encode_prompts(words))
    _diffusers_flow.PROMPT_BATCH, before = prompts, _diffusers_flow.PROMPT_BATCH
    clock("encode prompts, all at once", lambda: model.encode_prompts(words))
    _diffusers_flow.PROMPT_BATCH = before
    clock("encode images, 8 at once", lambda: model.posterior(pixels))
    with torch.no_grad():
        clock("encode images, all at once", lambda: model.vae.encode(pixels))


def show(medians: dict[str, float], algorithms: Iterable[str], batch: int) -> None:
    """Print the medians, and each algorithm's images per CPU second with each cache."""
    for name, value in medians.items():
        print(f"{'a batch, cached: ' * (name in CACHES) + name}: {1000 * value:.1f} ms")
    for name in algorithms:
        rates = {cache: batch / (medians[cache] + medians[name]) for cache in CACHES}
        print(f"{name}, images per CPU second: " + ", ".join(f"{c} {r:.1f}" for c, r in rates.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="posttrain-cache-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    spec = SD3(path="posttrain/tiny-sd3", max_sequence_length=16)
    loaded = {name: spec.load(torch.device("cpu"), "fp32") for name in CACHES}
    model = loaded["none"]
    for parameter in model.transformer.parameters():
        parameter.requires_grad_(True)
    policy, settings = Policy(model, micro_batch=64), Train(steps=1)
    strategy = Single().prepare(policy, settings, ALONE)
    sources = {name: batches(loaded[name], cache, options.batch, work) for name, cache in CACHES.items()}
    algorithms: dict[str, Algorithm] = {
        "sft": SFT(),
        "soar": SOAR(trajectory_length=3, num_sampling_steps=20),
    }
    clock = Clock()

    def step(algorithm: Algorithm, batch: Batch, draws: Draws) -> None:
        with torch.no_grad():
            items = algorithm.collect(batch, Tools(policy, draws))
        update(algorithm, policy, items, strategy, settings)

    for round_ in range(options.rounds + 1):
        drawn = {name: clock(name, lambda name=name: next(sources[name])) for name in CACHES}
        (_, batch, draws), *others = drawn.values()
        if not all(equal(batch, other) for _, other, _ in others):
            print("FAIL  a cached batch differs")
            return 1
        time_encoders(model, len(batch.conditions.table["pooled_projections"]), len(batch), clock)
        for name, algorithm in algorithms.items():
            clock(name, functools.partial(step, algorithm, batch, draws))
        if round_ == 0:
            clock.times.clear()  # warm-up, and the caches' filling
    show(clock.medians(), algorithms, options.batch)
    print("every cached batch equals the uncached one to the bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
