"""What the benchmarks share: a model without anybody's weights, a clock, two implementations side by side.

``--model tiny`` is the shape of the shipped posttrain/tiny-sd3, for a CPU; ``--model sd35m`` is that of
Stable Diffusion 3.5 Medium. Its text encoders are tiny by default, since T5-XXL alone fills 10 GB;
``--text-encoders true`` makes them as published. MFU is the model's FLOPs (a forward-backward counts 3
forwards, what checkpointing computes again counts nothing) over the time, over the measured throughput of
matrix products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from posttrain.engine.compiling import OPTIONS
from posttrain.model import FlowModel
from posttrain.models._diffusers_flow import DiffusersFlowModel
from posttrain.models._outline import configs_at
from posttrain.models._published import PUBLISHED
from posttrain.models.sd3 import SD3
from posttrain.planning.counts import META
from posttrain.planning.footprint import flops
from posttrain.planning.held import Held
from posttrain.planning.throughput import matrix_flops
from posttrain.policy import Policy
from posttrain.policy.activations import Checkpointing, checkpoint_blocks
from posttrain.policy.blocks import blocks
from posttrain.policy.tuning import Full, Tune
from posttrain.support.device import synchronize
from posttrain.support.wording import short

WORDS = ["red", "green", "blue", "circle", "square", "triangle", "left", "right", "above", "below"]


@dataclass
class Bench:
    """A model on a device, and how it is measured."""

    options: argparse.Namespace
    model: FlowModel
    seconds: dict[str, float] = field(default_factory=dict)
    """Where the engine's time goes."""
    open: list[str] = field(default_factory=list)
    """The parts that are being timed, the innermost last."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.options.precision == "bf16" else None

    def policy(self, chunk: int) -> Policy:
        """The model's policy, whose parameters are as they were tuned."""
        return Policy(self.model, autocast=self.autocast, micro_batch=chunk)

    def captions(self, count: int) -> list[str]:
        return [f"a {WORDS[i % 10]} {WORDS[i // 10 % 10]}" for i in range(count)]

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the block's time to ``part``, on the main thread; a block inside it counts by itself."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        inside = sum(self.seconds.values())
        synchronize(self.device)
        self.open.append(part)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.open.pop()
        own = time.perf_counter() - start - (sum(self.seconds.values()) - inside)
        self.seconds[part] = self.seconds.get(part, 0.0) + own


def arguments(title: str, batch: int, **more: Any) -> argparse.Namespace:
    """The command line of a benchmark; ``more`` are its own numbers and their defaults."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=("tiny", "sd35m"), default="tiny")
    parser.add_argument("--text-encoders", choices=("tiny", "true"), default="tiny")
    parser.add_argument("--resolution", type=int, help="64, and 512 of sd35m")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="fp32, and bf16 of sd35m")
    parser.add_argument("--batch", type=int, default=batch, help="samples in a step or an iteration")
    parser.add_argument("--rounds", type=int, default=7, help="repeats of each, alternating")
    parser.add_argument("--compile", type=int, default=0, help="1 compiles the engine's transformer blocks")
    parser.add_argument(
        "--checkpointing", choices=get_args(Checkpointing), default="off", help="of the engine's gradients"
    )
    parser.add_argument("--output", type=Path, help="a JSON file for the figures, as posttrain plan reads it")
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    options = parser.parse_args()
    large = options.model == "sd35m"
    options.resolution = options.resolution or (512 if large else 64)
    options.precision = options.precision or ("bf16" if large else "fp32")
    return options


def bench(options: argparse.Namespace, tune: Tune | None = None) -> Bench:
    """The model of the command line, tuned, on its device."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.device == "cpu":
        torch.set_num_threads(1)
    device, tokens = torch.device(options.device), 16 if options.model == "tiny" else 256
    model = _model(options, tokens, device, tune is not None)
    # a fresh output layer is zero, and every velocity and most gradients with it
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.02)
    (tune or Full()).apply(model.transformer, 0)
    return Bench(options, model)


def _model(
    options: argparse.Namespace, tokens: int, device: torch.device, frozen: bool = False
) -> DiffusersFlowModel:
    tiny = configs_at("posttrain/tiny-sd3")
    assert tiny is not None, "it comes with the package"
    configs = dict(tiny)
    if options.model == "sd35m":
        configs = dict(PUBLISHED["stabilityai/stable-diffusion-3.5-medium"])
        if options.text_encoders == "tiny":
            transformer = configs["transformer"]
            clip = [{**tiny["text_encoder"], "max_position_embeddings": 77} for _ in range(2)]
            sizes = [768, transformer["pooled_projection_dim"] - 768]
            for name, config, size in zip(("text_encoder", "text_encoder_2"), clip, sizes, strict=True):
                configs[name] = {
                    **config,
                    "projection_dim": size,
                    "hidden_size": 768 if size == 768 else 1280,
                }
                configs[name]["num_attention_heads"] = 4
            configs["text_encoder_3"] = {
                **tiny["text_encoder_3"],
                "d_model": transformer["joint_attention_dim"],
            }
    if layers := getattr(options, "layers", 0):
        # one block of each kind compiles to what the whole model's do
        configs["transformer"] = {
            **configs["transformer"],
            "num_layers": layers,
            "dual_attention_layers": [0],
        }
    dtype = "bf16" if options.precision == "bf16" else "fp32"
    spec = SD3(path=options.model, max_sequence_length=tokens, dtype=dtype)
    made = spec.outline_of(configs, dtype if frozen else "fp32", device)
    assert made is not None, "every component has a configuration"
    return made


def forward_flops(it: Bench) -> int:
    """FLOPs of one forward of one sample, counted."""
    tokens = it.model.spec.max_sequence_length  # type: ignore[attr-defined]
    model = _model(it.options, tokens, META)
    with torch.no_grad():
        condition = model.encode_prompts(["a"])
    side = it.options.resolution
    latents = torch.empty(1, *model.latent_shape(side, side), device=META)
    return flops(lambda: model.velocity(latents, torch.empty(1, device=META), condition), model.transformer)


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
        it.options.output.write_text(json.dumps({**found, **about}, indent=2, default=str))


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


def watched(it: Bench) -> None:
    """Let the model's parts tell how long they take: text and images encoded, rollout, reward."""
    model: Any = it.model
    for name, part in (("encode_prompts", "encoding"), ("encode_images", "encoding"), ("decode", "reward")):
        setattr(model, name, _clocked(it, getattr(model, name), part))
    velocity = model.velocity

    def clocked(*arguments: Any) -> Any:
        if torch.is_grad_enabled() or it.open:
            return velocity(*arguments)
        with it.timed("rollout"):
            return velocity(*arguments)

    model.velocity = clocked


def _clocked(it: Bench, function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with it.timed(part):
            return function(*arguments)

    return call
