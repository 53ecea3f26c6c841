"""Measures what the cache saves of an SFT and a SOAR step, and what filling it costs.

    python benchmarks/cache_step.py [--batch 32] [--rounds 7]

The shipped tiny-sd3 on Shapes images, one thread, in seconds of this process's CPU time, which neighbours on
the machine hardly change. Medians of alternating rounds. Exits with 1 where a cached batch differs.
"""

from __future__ import annotations

import argparse
import atexit
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from posttrain.algorithm import Algorithm, Batch, Tools
from posttrain.algorithms.sft import SFT
from posttrain.algorithms.soar import SOAR
from posttrain.data.batches import batch_source_of
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
    source = batch_source_of(made.stages[0].data, model, work, made.stages[0].train.batch_size)
    start = time.process_time()
    fill_for_stage(made, made.stages[0], model, source, Console(quiet=True))
    print(f"filling, {cache}: {time.process_time() - start:.2f} s")
    yield from source.batches((0, 0), 0)


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
    times: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        times.setdefault(name, []).append(time.process_time() - start)
        return result

    for round_ in range(options.rounds + 1):
        drawn = {name: timed(name, lambda name=name: next(sources[name])) for name in CACHES}
        (_, batch, draws), *others = drawn.values()
        for _, other, _ in others:
            same = torch.equal(batch.latents, other.latents) and all(
                torch.equal(tensor, other.conditions.table[key])
                for key, tensor in batch.conditions.table.items()
            )
            if not same:
                print("FAIL  a cached batch differs")
                return 1
        prompts = [""] * len(batch.conditions.table["pooled_projections"])
        timed("encode prompts, 8 at once", lambda prompts=prompts: model.encode_prompts(prompts))
        _diffusers_flow.PROMPT_BATCH, before = len(prompts), _diffusers_flow.PROMPT_BATCH
        timed("encode prompts, all at once", lambda prompts=prompts: model.encode_prompts(prompts))
        _diffusers_flow.PROMPT_BATCH = before
        pixels = torch.rand(len(batch), 3, 64, 64) * 2 - 1
        timed("encode images, 8 at once", lambda pixels=pixels: model.posterior(pixels))
        with torch.no_grad():
            timed("encode images, all at once", lambda pixels=pixels: model.vae.encode(pixels))

        def step(algorithm: Algorithm, batch: Batch = batch, draws: Draws = draws) -> None:
            with torch.no_grad():
                items = algorithm.collect(batch, Tools(policy, draws))
            update(algorithm, policy, items, strategy, settings, 1)

        for name, algorithm in algorithms.items():
            timed(name, lambda algorithm=algorithm: step(algorithm))
        if round_ == 0:
            times.clear()  # warm-up, and the caches' filling
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{'a batch, cached: ' * (name in CACHES) + name}: {1000 * value:.1f} ms")
    for name in algorithms:
        rates = {cache: options.batch / (medians[cache] + medians[name]) for cache in CACHES}
        print(f"{name}, images per CPU second: " + ", ".join(f"{c} {r:.1f}" for c, r in rates.items()))
    print("every cached batch equals the uncached one to the bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
